"""One worker process: the engine, its KV and both roles behind its three doors."""
