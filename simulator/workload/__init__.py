"""Requests to simulate: read from traces or generated."""
