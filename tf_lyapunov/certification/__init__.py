"""What a user asks for: radii, certificates, and their proof files."""

from tf_lyapunov.bounds.chains import Chain
from tf_lyapunov.bounds.composition import Contribution
from tf_lyapunov.bounds.dissipativity import NetworkIndices, network_indices
from tf_lyapunov.bounds.stages import Stage, stages
from tf_lyapunov.bounds.upper_bound import GainBound, lipschitz_upper_bound
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.certification.margins import certify
from tf_lyapunov.program.network import Network, Node, read_network
from tf_lyapunov.program.registry import register_gain

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
