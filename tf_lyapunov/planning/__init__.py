"""Estimates of what a training takes: counts, memory, time; see `plan`."""

from tf_lyapunov.planning.bounds import BoundCost, bound_cost
from tf_lyapunov.planning.counting import LayerCost, layer_costs
from tf_lyapunov.planning.devices import DEVICES, Cluster, Device, parse_devices
from tf_lyapunov.planning.estimate import Plan, plan, plan_model

__all__ = [
    "DEVICES",
    "BoundCost",
    "Cluster",
    "Device",
    "LayerCost",
    "Plan",
    "bound_cost",
    "layer_costs",
    "parse_devices",
    "plan",
    "plan_model",
]
