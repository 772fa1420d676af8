"""How long a step of a model takes on a device: fitted, interpolated, or from first principles."""
