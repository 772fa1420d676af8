"""Measured profiles of models on devices, in the formats that others publish and in our own."""
