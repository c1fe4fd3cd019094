"""Plants x⁺ = A x + B_q q + B u: a linear part, and nonlinearities in sectors."""

import numpy as np

from tf_lyapunov.verification import loops


def _vector(name, values):
    found = np.array(values, np.float64)
    if found.ndim != 1 or not found.size or not np.all(np.isfinite(found)):
        raise ValueError(
            f"`{name}` must be a vector of finite numbers, one per state. Received: {values!r}."
        )
    return found


def _matrix(name, values, rows=None):
    found = np.array(values, np.float64)
    if found.ndim == 1 and rows is not None:
        found = found[:, None]
    if found.ndim != 2 or not found.size or (rows is not None and len(found) != rows):
        wanted = "square" if rows is None else f"with {rows} rows"
        raise ValueError(f"`{name}` must be a matrix {wanted}. Received: shape {found.shape}.")
    if not np.all(np.isfinite(found)):
        raise ValueError(f"`{name}` must hold finite numbers. Received: NaN or infinity.")
    return found


class SineGap:
    """q = s - sin s, s = readsᵀx: what a pendulum has beyond its linearisation.

    0 ≤ s q ≤ L s² with L = 1 - sin r/r for |s| ≤ r < π, since sin s/s falls there; L ≤ 1.21724 for
    all s. The sector is taken on the interval that the region proved leaves.

    Args:
        reads: float (n,), the row c of s = cᵀx.
        enters: float (n,), the column through which q enters the state.

    Raises:
        ValueError: if a vector is empty or not finite.

    Example:

    >>> gap = SineGap(reads=[1.0, 0.0], enters=[0.0, -0.4])
    >>> float(gap.function(0.0))
    0.0
    """

    kind, sector = loops.SINE, (0.0, 2.0, np.inf)

    def __init__(self, reads, enters):
        self.reads, self.enters = _vector("reads", reads), _vector("enters", enters)

    def function(self, s):
        """q of s, elementwise."""
        return s - np.sin(s)


class SectorGap:
    """q = ψ(s), s = readsᵀx, in a sector that the caller states: low·s² ≤ s ψ(s) ≤ high·s².

    The sector is an assumption of every claim about the plant, which says so.

    Args:
        reads, enters: see `SineGap`.
        low, high: the sector's slopes.
        width: it holds for |s| ≤ width; infinity for all s.
        function: ψ, elementwise on float64 arrays, for simulation; None where no function is
            known: simulations then draw slopes of the sector at random.

    Raises:
        ValueError: if the sector is empty or not finite, or the function leaves it.

    Example:

    >>> SectorGap([1.0, 0.0], [0.0, 1.0], low=0.0, high=1.0, width=2.0, function=np.tanh).high
    1.0
    """

    kind = loops.STATED

    def __init__(self, reads, enters, *, low, high, width=np.inf, function=None):
        self.reads, self.enters = _vector("reads", reads), _vector("enters", enters)
        self.low, self.high, self.width = float(low), float(high), float(width)
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low <= self.high):
            raise ValueError(
                "A sector needs finite slopes `low` ≤ `high`. "
                f"Received: low={low!r}, high={high!r}."
            )
        if not self.width > 0:
            raise ValueError(f"`width` must be positive. Received: width={width!r}.")
        self.sector = (self.low, self.high, self.width)
        self._function = function
        if function is not None:
            self._try()

    def _try(self):
        wide = min(self.width, 100.0)
        s = np.concatenate([-np.geomspace(1e-3, 1.0, 200), np.geomspace(1e-3, 1.0, 200)]) * wide
        q = np.asarray(self._function(s), np.float64)
        room = 1e-9 * (1 + abs(self.low) + abs(self.high)) * s * s
        if q.shape != s.shape or not np.all(
            (s * q >= self.low * s * s - room) & (s * q <= self.high * s * s + room)
        ):
            raise ValueError(
                f"`function` leaves the sector [{self.low:g}, {self.high:g}] that was stated for "
                f"|s| ≤ {self.width:g}. Received: slopes from {np.min(q / s):g} to "
                f"{np.max(q / s):g}. State a wider one."
            )

    def function(self, s):
        """ψ(s), or s times a slope of the sector drawn at random for every number."""
        if self._function is not None:
            return np.asarray(self._function(s), np.float64)
        rng = np.random.default_rng()
        ends = rng.integers(0, 2, np.shape(s))
        return s * np.where(ends == 0, self.low, self.high)


class Plant:
    """x⁺ = A x + B_q q + B u in discrete time, with q_k = ψ_k(c_kᵀx).

    The matrices are float64 and taken to be exact; x = 0, u = 0 is the equilibrium.

    Args:
        state: A (n, n).
        input: B (n, m), or (n,) for one input.
        gaps: nonlinearities, `SineGap` or `SectorGap`.

    Raises:
        ValueError: if shapes do not fit or numbers are not finite.
        TypeError: for a nonlinearity of another type.

    Example: a pendulum held upright, sampled by Euler's rule:

    >>> dt, gravity, mass, length, friction = 0.02, 10.0, 0.15, 0.5, 0.05
    >>> inertia = mass * length**2
    >>> A = [[1, dt], [gravity / length * dt, 1 - friction / inertia * dt]]
    >>> gap = SineGap(reads=[1, 0], enters=[0, -gravity / length * dt])
    >>> Plant(A, [0, dt / inertia], gaps=[gap])
    Plant(states=2, inputs=1, gaps=1)
    """

    def __init__(self, state, input, gaps=()):
        self.state = _matrix("state", state)
        if self.state.shape[0] != self.state.shape[1]:
            raise ValueError(f"`state` must be square. Received: shape {self.state.shape}.")
        n = len(self.state)
        self.input = _matrix("input", input, n)
        self.gaps = tuple(gaps)
        for gap in self.gaps:
            if not isinstance(gap, SineGap | SectorGap):
                raise TypeError(
                    f"`gaps` must hold `SineGap` or `SectorGap`. Received: a {type(gap).__name__}."
                )
            if gap.reads.shape != (n,) or gap.enters.shape != (n,):
                raise ValueError(
                    f"A gap reads and enters {n} states. Received: reads of shape "
                    f"{gap.reads.shape}, enters of shape {gap.enters.shape}."
                )

    def __repr__(self):
        n, m = self.input.shape
        return f"Plant(states={n}, inputs={m}, gaps={len(self.gaps)})"

    def arrays(self):
        """`verification.loops.Plant` of the same."""
        n, count = len(self.state), len(self.gaps)
        reads = np.array([g.reads for g in self.gaps]).reshape(count, n)
        enters = np.array([g.enters for g in self.gaps]).reshape(count, n).T
        sectors = np.array([g.sector for g in self.gaps], np.float64).reshape(count, 3)
        kinds = np.array([g.kind for g in self.gaps], np.int64)
        return loops.Plant(self.state, self.input, np.array(enters), reads, kinds, sectors)

    def step(self, x, u):
        """x⁺, float64 (…, n).

        Args:
            x: float64 (…, n).
            u: float64 (…, m).
        """
        after = x @ self.state.T + u @ self.input.T
        for gap in self.gaps:
            after = after + gap.function(x @ gap.reads)[..., None] * gap.enters
        return after
