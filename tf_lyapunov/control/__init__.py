"""Closed loops: regions of attraction under a network's control, and passivity."""

from tf_lyapunov.control.passivity import (
    PassiveLoop,
    PlantIndices,
    linear_indices,
    passive_feedback,
)
from tf_lyapunov.control.plants import Plant, SectorGap, SineGap
from tf_lyapunov.control.region import RegionOfAttraction, region_of_attraction

__all__ = [
    "PassiveLoop",
    "Plant",
    "PlantIndices",
    "RegionOfAttraction",
    "SectorGap",
    "SineGap",
    "linear_indices",
    "passive_feedback",
    "region_of_attraction",
]
