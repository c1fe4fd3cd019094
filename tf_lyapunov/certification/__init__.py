"""Certificates: reads a Keras model through one door (`network`), float64 NumPy after it."""

from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.certification.chains import Chain
from tf_lyapunov.certification.composition import Contribution, GainBound, lipschitz_upper_bound
from tf_lyapunov.certification.dissipativity import NetworkIndices, network_indices
from tf_lyapunov.certification.margins import certify
from tf_lyapunov.certification.network import Network, Node, read_network
from tf_lyapunov.certification.registry import register_gain
from tf_lyapunov.certification.stages import Stage, stages

__all__ = [
    "Certificate",
    "Chain",
    "Contribution",
    "GainBound",
    "Network",
    "NetworkIndices",
    "Node",
    "Stage",
    "certify",
    "lipschitz_upper_bound",
    "network_indices",
    "read_network",
    "register_gain",
    "stages",
]
