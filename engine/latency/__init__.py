"""How long a step takes, as a model of it: what the timed engine sleeps and the simulator counts."""
