"""One worker process: the engine, its KV and both roles behind its doors: for routers, for workers, for control."""
