"""Re-checks proof files from a model's weights alone.

NumPy only (`reading` alone uses Keras, to read settings and weights): no solver, and nothing of the
code that made the certificate. Every bound is derived here again in float64, rounded outwards.
"""

from tf_lyapunov.verification.properties import PropertyVerification
from tf_lyapunov.verification.ranges import RangeVerification
from tf_lyapunov.verification.rechecking import Verification, verify

__all__ = ["PropertyVerification", "RangeVerification", "Verification", "verify"]
