"""Which measures of attacks a configuration gives figures of: what its confirmatory family can declare."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isotone.config import Attacks, Declared

_ONE_VARIANT = {"gcg": "top_k", "coordinate": "random", "pgd": "l2"}
"""Further attacks that are made in one variant, as their rows name it."""

_FURTHER = (*_ONE_VARIANT, "frequency")


def measured_variants(attacks: "Attacks") -> dict[str, tuple[str, ...]]:
    """Return by attack, as results name it, its variants with figures in the primary protocol (triggers: their own).

    The published attack is none of them: it edits scored tokens.
    """
    asked = [name for name in _FURTHER if getattr(attacks, name) is not None]
    found: dict[str, tuple[str, ...]] = {
        "hotflip": attacks.hotflip.methods,
        "triggers": ("universal",),
        "random_edits": ("uniform", "frequency") if "frequency" in asked else ("uniform",),
    }
    found |= {name: (_ONE_VARIANT[name],) for name in asked if name in _ONE_VARIANT}
    return found | ({"ensemble": ("worst_case",)} if asked else {})


def primary_method(attacks: "Attacks") -> str:
    """Return HotFlip's method that conclusions rest on: the first of iterative, beam and once that is configured."""
    return next(name for name in ("iterative", "beam", "once") if name in attacks.hotflip.methods)


def declared_variant(declared: "Declared", attacks: "Attacks") -> str | None:
    """Return the variant that a member of the family means: the one that it names, else the one there is.

    None for a measure of clean text.
    """
    if declared.variant is not None or declared.attack is None:
        return declared.variant
    return primary_method(attacks) if declared.attack == "hotflip" else measured_variants(attacks)[declared.attack][0]


def why_never_measured(declared: "Declared", attacks: "Attacks") -> str | None:
    """Say which key of a member names what this configuration can give no figure of; None if none does."""
    if declared.attack is None:
        return None
    variants = measured_variants(attacks)
    if declared.attack not in variants:
        hint = f" (attacks.{declared.attack} is not asked for)" if declared.attack in _ONE_VARIANT else ""
        hint = " (no further attack is asked for)" if declared.attack == "ensemble" else hint
        return f"attack: found {declared.attack!r}, allowed: {', '.join(variants)}{hint}"
    allowed = variants[declared.attack]
    if declared.variant is None and declared.attack != "hotflip" and len(allowed) > 1:
        return f"variant: which one of {declared.attack}? allowed: {', '.join(allowed)}"
    if declared.variant not in (None, *allowed):
        return f"variant: found {declared.variant!r}, allowed: {', '.join(allowed)}"
    if declared.attack == "triggers" and declared.metric != "delta_nll":
        return f"metric: found {declared.metric!r}, allowed for triggers: delta_nll"
    return None
