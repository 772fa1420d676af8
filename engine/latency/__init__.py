"""How long a step takes: what the timed engine sleeps and the simulator counts."""
