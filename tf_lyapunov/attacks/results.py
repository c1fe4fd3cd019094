"""What an attack found, counted among the inputs that were right before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tf_lyapunov.showing import MOST_ROWS, Page, Shown, Table, number
from tf_lyapunov.theory.balls import Ball


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult(Shown):
    """What an attack found, verified on the model itself; failures are reported as failures.

    Attributes:
        x_adv: float32 array like the input; for several a list, tuple or dict like theirs. The
            clean input where it is misclassified already, the adversarial input where the attack
            succeeded, else the attack's best iterate.
        success: bool array `(n,)`: outputs finite, ‖x_adv - x‖ ≤ radius in float64, and the
            model's prediction at `x_adv` wrong (or the target, for targeted attacks).
        distance: float64 array `(n,)`, the ball's norm of `x_adv - x`; NaN without success.
        labels: int array `(n,)`, true labels, or targets.
        predictions_adv: int array `(n,)`, the model's predictions at `x_adv`.
        margins: float64 array `(n,)`, f_y - max_j≠y f_j of the logits at `x_adv`.
        loss: float64 array `(n,)`, the attack's per-sample loss at `x_adv`.
        zero_gradient: bool array `(n,)`: attacked without success, and the loss had a zero or
            non-finite gradient on the way, so that the failure says little about the model.
        norm: `L2` or `Linf`, the norm of `distance`.
        ball: the allowed perturbations; None if all are.
        targeted: whether `labels` were targets.
        attack: description of the attack.
        notes: what was done otherwise than asked, and why, in sentences.
    """

    x_adv: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    labels: np.ndarray
    predictions_adv: np.ndarray
    margins: np.ndarray
    loss: np.ndarray
    zero_gradient: np.ndarray
    norm: type[Ball]
    ball: Ball | None
    targeted: bool
    attack: str
    notes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.success)

    @property
    def success_rate(self) -> float:
        """Share of inputs on which the attack succeeded."""
        return float(np.mean(self.success))

    @property
    def robust_accuracy(self) -> float:
        """Share of inputs on which it did not; accuracy under attack for true labels."""
        return 1.0 - self.success_rate

    @property
    def right_before(self) -> np.ndarray:
        """Bool (n,): not decided so before the attack, i.e. right for true labels."""
        return ~(self.success & (self.distance == 0))

    @property
    def broken(self) -> np.ndarray:
        """Bool (n,): right before, and broken by the attack."""
        return self.success & self.right_before

    def summary(self) -> dict:
        """The result in a few JSON-ready numbers.

        `broken` and `median_distance` (None where nothing is broken) are about the `right_before`
        inputs; `robust_accuracy` is a share of all.
        """
        found = self.distance[self.broken]
        return {
            "attack": self.attack,
            "n": len(self),
            "targeted": self.targeted,
            "right_before": int(np.sum(self.right_before)),
            "broken": len(found),
            "success_rate": self.success_rate,
            "robust_accuracy": self.robust_accuracy,
            "median_distance": float(np.median(found)) if len(found) else None,
            "zero_gradient": int(np.sum(self.zero_gradient)),
        }

    def __str__(self):
        found, right = self.distance[self.broken], int(np.sum(self.right_before))
        text = f"{self.attack}: {len(found)} of {right} inputs broken"
        if right < len(self):
            state = "at their targets" if self.targeted else "misclassified"
            text += f" ({len(self) - right} more were {state} before)"
        if len(found):
            text += f", median distance {np.median(found):.4g}"
        stuck = int(np.sum(self.zero_gradient))
        text += f"; {stuck} failed at a zero gradient" if stuck else ""
        return " ".join([text, *(f"({note})" for note in self.notes)])

    def _page(self):
        found, right = self.distance[self.broken], int(np.sum(self.right_before))
        facts = (
            ("broken", f"{len(found)} of {right} inputs"),
            ("at their targets before" if self.targeted else "wrong before", len(self) - right),
            ("median distance", number(float(np.median(found)) if len(found) else None)),
            ("attack", self.attack),
            ("failed at a zero gradient", int(np.sum(self.zero_gradient))),
        )
        rows = [
            (i, int(self.labels[i]), int(self.predictions_adv[i]), number(self.distance[i]))
            for i in range(min(len(self), MOST_ROWS))
        ]
        columns = ("input", "target" if self.targeted else "label", "decision", "distance")
        return Page(type(self).__name__, facts, (Table(columns, rows, "", len(self)),), self.notes)
