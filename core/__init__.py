"""The vocabulary every other room speaks: ids, requests, stages, errors, clock, block hashes, names."""
