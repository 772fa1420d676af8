"""The production decisions under a virtual clock: requests, workers and links as events on a heap."""
