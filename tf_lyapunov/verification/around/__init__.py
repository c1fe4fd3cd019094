"""Radii by bounds around single inputs, re-checked from the weights and a file's multipliers."""
