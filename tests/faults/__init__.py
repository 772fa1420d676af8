"""Fault rows: real worker processes, real NIXL, and one fault injected on purpose."""
