"""Seconds of a stage: its work divided by the target's rates."""

from isotone.config import Training
from isotone.planning.target import Target
from isotone.planning.work import Work


def stage_seconds(
    work: Work, target: Target, recipe: Training | None, save_bytes: float
) -> tuple[float | None, str, bool | None]:
    """Return a stage's seconds, where they come from, and how firm they are (as ``judged`` takes it).

    Args:
        work: of all its nodes.
        target: the machine.
        recipe: of the arm that is trained, if one is.
        save_bytes: bytes of one of its checkpoints.
    """
    rates = target.rates
    computing = work.train + work.evaluate + work.attack
    light_s = _light_seconds(work, target)
    if not computing:
        return (
            light_s,
            "measured here" if target.host_measured else "assumed rates",
            True if target.host_measured else None,
        )
    # validation computes in the training's precision
    parts = [(work.train, rates.train), (work.evaluate, rates.train if work.train else rates.evaluate)]
    parts.append((work.attack, rates.attack))
    if any(flops and not rate for flops, rate in parts):
        return None, "", None
    seconds = sum(flops / rate for flops, rate in parts if flops and rate)
    if target.host_measured:
        seconds += light_s
        if recipe and rates.save:  # and saves by the clock
            seconds += seconds / (60 * recipe.save_every_minutes) * save_bytes / rates.save
        return seconds, f"computed; rate {target.rate_origin}", True
    if target.bounded and not work.train:
        return seconds, "at least: fp32 rate not stated", False
    return seconds, f"computed; rate {target.rate_origin}", True


def _light_seconds(work: Work, target: Target) -> float:
    """Return the seconds beside a model's passes: start, loading, saving, packing, the optimizer."""
    rates = target.rates
    amounts = (
        (work.loaded, rates.load),
        (work.saved, rates.save),
        (work.packed, rates.pack),
        (work.optimizer, rates.optimizer),
    )
    return work.constant_s + (rates.start_s or 0) + sum(amount / rate for amount, rate in amounts if rate)
