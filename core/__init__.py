"""The vocabulary of every room: ids, requests, stages, errors, clock, block hashes, names."""
