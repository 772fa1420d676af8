"""The production decisions under a virtual clock: requests, workers, links as events on a heap."""
