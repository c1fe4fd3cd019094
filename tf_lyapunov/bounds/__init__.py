"""Gains of whole networks: composition, products of layers, multipliers, semidefinite programs."""
