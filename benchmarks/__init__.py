"""The benches of `baton bench`: each measures on this machine what the design promises."""
