"""One worker process: the engine, its KV and both roles behind doors for routers, workers, control."""
