"""Bounds around an input."""
