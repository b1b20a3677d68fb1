"""Seconds of a stage: its work divided by the target's rates."""

from isotone.config import Training
from isotone.planning.sizes import Work
from isotone.planning.target import Target

_AMOUNTS = {
    "load": "loaded",
    "save": "saved",
    "pack": "packed",
    "optimizer": "optimizer",
    "tokenizer_s": "tokenizers",
    "vocabulary_s": "vocabularies",
}
"""Rates of a processor's work beside the model's passes, and what each is multiplied by or divides."""


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
        assumed = target.assumed & ({"start_s"} | {name for name in _AMOUNTS if getattr(work, _AMOUNTS[name])})
        return light_s, "assumed rates" if assumed else "measured here", None if assumed else True
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
    rates, seconds = target.rates, work.constant_s + (target.rates.start_s or 0)
    for name, amount in _AMOUNTS.items():
        if rate := getattr(rates, name):
            seconds += getattr(work, amount) * rate if name.endswith("_s") else getattr(work, amount) / rate
    return seconds
