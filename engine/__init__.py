"""Runs a model over a paged KV cache, and plans its mixed steps of prefill chunks and decodes."""
