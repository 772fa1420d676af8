"""The prefill role: takes prompts, announces their KV under a lease, samples the first token."""
