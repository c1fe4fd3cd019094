"""Proven upper bounds of α_lim on balls: by gains, by slopes on each ball, by ranges on shells."""

import math
import time

import numpy as np

from tf_lyapunov.bounds.choice import network_gain
from tf_lyapunov.bounds.composition import lipschitz_constants, rounding_errors
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.flow import flow_of
from tf_lyapunov.local.shells import Shells
from tf_lyapunov.local.slopes import LocalGains
from tf_lyapunov.program import rounding
from tf_lyapunov.program.logits import LogitsModel

# An estimate that is within this factor of the bound leaves nothing to look for.
_CLOSE = 1.02


class UpperBounds:
    """Proven gains of F on balls, (n, k).

    Args:
        view: of the network, with `network` (or None) and `head`.
        norm, outputs, method, time_budget: see `localized_robustness`.
        count: number of points that will be asked for, which share the time.
    """

    def __init__(self, view, norm, outputs, method, time_budget, count):
        self.left = count
        self.norm, self.outputs, self.network = norm, outputs, view.network
        if self.network is None:
            return
        self.deadline = deadline = time.monotonic() + time_budget
        try:
            kind = "l2" if norm == 2 else "linf"
            self.shells = Shells(flow_of(self.network), kind, view.head, deadline)
        except UnsupportedLayerError:
            self.shells = None
        constants = lipschitz_constants(self.network)
        # The rest of the time is for the balls.
        bound = network_gain(self.network, constants, method, time_budget=time_budget / 2)
        self.gain, self.pairs = bound.gain_upper_bound, bound.pairs
        self.logits = LogitsModel(self.network)
        self.rows = _row_sum_gain(self.network) if norm != 2 else math.inf
        try:
            self.local = LocalGains(self.network) if norm == 2 else None
        except UnsupportedLayerError:
            self.local = None

    def __call__(self, x, radii, estimates):
        """Bounds for points (n, …); `estimates` (n, k) say where there is something to gain."""
        result = np.full((len(x), len(radii)), np.inf)
        if self.network is None:
            return result
        cast = x.astype(np.float32)
        logits = self.logits.predict(cast, len(x))
        # Of the computed logits, and of the cast of x to float32.
        moved = np.linalg.norm((x - cast).reshape(len(x), -1), axis=1) * (1 + 1e-9)
        errors = self.gain * moved + rounding_errors(
            self.network, rounding.euclidean_norms_up(cast), self.network.logits
        )
        features, classes = x[0].size, logits.shape[1]
        for i in range(len(x)):
            centers = self.local.centers(x[i].astype(np.float32)) if self.local else None
            for k, radius in enumerate(radii):
                # An l∞ ball lies in the l2 ball that is √d larger.
                wide = radius * (1.0 if self.norm == 2 else math.sqrt(features)) + moved[i]
                gain, pairs = self.gain, self._pairs(classes)
                if centers is not None:
                    own = self.local.pair_gains(centers, wide, np.eye(classes))
                    gain = min(gain, float(np.linalg.norm(own)) * (1 + 1e-9))
                slope = 1.0
                if self.outputs == "softmax":
                    slope = self._softmax_slope(logits[i], errors[i], pairs, wide)
                bound = gain * slope
                if self.norm != 2:
                    # ‖J softmax‖_∞ = max 2p(1-p) is the same bound.
                    bound = min(bound * math.sqrt(features), self.rows * slope)
                result[i, k] = float(rounding.up(bound * (1 + 1e-12)))
            if self.shells is not None:
                enough = _CLOSE * estimates[i]
                now = time.monotonic()
                share = now + (self.deadline - now) / max(self.left, 1)
                result[i] = self.shells.improved(x[i], radii, result[i], enough, share)
            self.left -= 1
        return result

    def _pairs(self, classes):
        if self.pairs is not None:
            return self.pairs
        return np.full((classes, classes), self.gain * math.sqrt(2) * (1 + 1e-12))

    @staticmethod
    def _softmax_slope(logits, error, pairs, radius):
        """Largest 2p(1-p) (softmax) or p(1-p) (sigmoid) on the ball."""
        if len(logits) == 1:
            margin = abs(float(logits[0])) - error - radius * float(pairs[0, 0])
            top = 1 / (1 + math.exp(-max(margin, 0.0)))
            return top * (1 - top) * (1 + 1e-9)
        c = int(np.argmax(logits))
        gaps = logits[c] - np.delete(logits, c) - 2 * error
        gaps = gaps - radius * np.delete(pairs[c], c)
        top = 1 / (1 + float(np.sum(np.exp(-np.clip(gaps, -50, 500)))))
        return 0.5 if top <= 0.5 else min(0.5, 2 * top * (1 - top) * (1 + 1e-9) + 1e-15)


def _row_sum_gain(network):
    """l∞ gain: product of the largest absolute row sums of a dense chain, infinite otherwise."""
    total = 1.0
    if not network.is_chain:
        return math.inf
    for node in network.nodes:
        if node.matrix is not None and len(node.output_shape) == 2:
            total *= float(np.abs(node.matrix).sum(axis=0).max()) * (1 + 1e-9)
        elif node.kind == "activation" and node.sector is not None:
            total *= node.sector.magnitude
        elif node.kind not in ("input", "identity", "reshape") or "linear" in node.kind:
            return math.inf
        if node.name == network.logits:
            break
    return total
