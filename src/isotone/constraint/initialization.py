"""Where constrained weights start, and which starts a parametrization can express.

``absolute`` and ``relu`` look at one matrix; ``shift``, ``calibrated_shift``, ``nnls`` and ``rotated_nnls`` look at the
whole model (see their modules; rotation.py for the last); ``unchanged`` leaves everything as it is, for the control
``sign_frozen``.
"""

from torch import Tensor

from isotone.constraint.parametrization import FLOOR, PARAMETRIZATIONS
from isotone.constraint.recipes import ROTATED
from isotone.errors import UsageError

INITIALIZATIONS = ("absolute", "relu", "shift", "calibrated_shift", "nnls", ROTATED, "unchanged")
"""Names of the initializations."""

FITTED = ("calibrated_shift", "nnls", ROTATED)
"""Those that are fitted on calibration text."""

_SPARSE = {
    "relu": "sets about half of the weights to 0",
    "nnls": "sets most of the weights to 0",
    ROTATED: "sets most of the weights to 0",
}

MARGIN = 0.1
"""Smallest shifted weight, in standard deviations of the matrix, where the parametrization cannot move or reach 0."""


def why_refused(parametrization: str, initialization: str) -> str | None:
    """Return why a pair does not fit, or None where it does."""
    chosen = PARAMETRIZATIONS[parametrization]
    if parametrization == "sign_frozen" and initialization != "unchanged":
        return "sign_frozen keeps the signs that the weights have, so they start unchanged"
    if initialization == "unchanged" and parametrization != "sign_frozen":
        return f"unchanged leaves negative weights, which {parametrization} cannot hold"
    if initialization not in _SPARSE:
        return None  # absolute has next to no zeros, the shifts keep a margin where it is needed
    zeros = f"{initialization} {_SPARSE[initialization]}"
    if not chosen.contains_zero:
        return f"{zeros}, which {parametrization} cannot reach"
    if not chosen.revives_zero:
        return f"{zeros}, where {parametrization} has no slope: they would stay there"
    return None


ANNEALED_PAIR = ("projection", "unchanged")
"""The pair that a constraint which is annealed has: it starts from the unconstrained weights."""

ALLOWED_PAIRS = frozenset((p, i) for p in PARAMETRIZATIONS for i in INITIALIZATIONS if why_refused(p, i) is None)
"""Pairs (parametrization, initialization) that fit each other."""


def require_pair(parametrization: str, initialization: str, anneal: float | None = None) -> None:
    """Check names and their combination.

    Raises:
        UsageError: an unknown name, or a pair that does not fit; lists what is allowed.
    """
    if anneal is not None:
        if (parametrization, initialization) != ANNEALED_PAIR or not 0 < anneal <= 1:
            raise UsageError(
                f"constraint.anneal: takes what is below 0 away in a share of the steps, from 0 to 1, so it goes with "
                f"parametrization projection and initialization unchanged; found {anneal:g}, {parametrization} and "
                f"{initialization}"
            )
        return
    if parametrization not in PARAMETRIZATIONS:
        raise UsageError(
            f"constraint.parametrization: {parametrization!r} is unknown; allowed: {', '.join(PARAMETRIZATIONS)}"
        )
    if initialization not in INITIALIZATIONS:
        raise UsageError(
            f"constraint.initialization: {initialization!r} is unknown; allowed: {', '.join(INITIALIZATIONS)}"
        )
    if reason := why_refused(parametrization, initialization):
        fitting = [p for p in PARAMETRIZATIONS if (p, initialization) in ALLOWED_PAIRS]
        raise UsageError(
            f"constraint.initialization: {reason}; with {initialization} use one of {', '.join(fitting)} as "
            f"parametrization"
        )


def margin_for(parametrization: str) -> float:
    """Return how far above 0 a shift must end, in standard deviations of the matrix."""
    return 0.0 if PARAMETRIZATIONS[parametrization].revives_zero else MARGIN


def absolute(w: Tensor, contains_zero: bool) -> Tensor:
    """Return |W|, the published start. The published ε is a floor here, so that it is not applied twice."""
    return w.abs() if contains_zero else w.abs().clamp_min(FLOOR)


def relu(w: Tensor) -> Tensor:
    """Return max(W, 0): correlated .86 with a symmetric W, where |W| has correlation 0."""
    return w.clamp_min(0)
