"""`baton bench transfer`: what the KV hand-off costs over the bare copy, and what it hides."""
