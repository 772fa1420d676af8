"""The hand-off of KV between workers: leases, the closing question, transports and their plans."""
