"""One worker process: the engine, its KV and both roles behind one gRPC door."""
