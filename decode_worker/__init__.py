"""The decode role: pulls the KV of a prompt, then generates; or computes the KV itself."""
