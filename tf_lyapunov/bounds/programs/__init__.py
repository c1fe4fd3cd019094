"""Semidefinite programs of multipliers: searches, and the proof of what they found."""
