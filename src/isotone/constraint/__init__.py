"""The idea: which weights are constrained, how they are kept non-negative, where they start, and what is then proved.

Names are loaded when they are first used, so that the table of architectures and recipes costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotone.constraint.architectures import ARCHITECTURES, Architecture
    from isotone.constraint.certificate import Certificate, certify
    from isotone.constraint.constraint import Constraint, constrain
    from isotone.constraint.folding import fold
    from isotone.constraint.recipes import RECIPES, Recipe, resolve_recipe

_HOME = {
    "ARCHITECTURES": "architectures",
    "Architecture": "architectures",
    "Certificate": "certificate",
    "certify": "certificate",
    "Constraint": "constraint",
    "constrain": "constraint",
    "fold": "folding",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "resolve_recipe": "recipes",
}

__all__ = [
    "ARCHITECTURES",
    "RECIPES",
    "Architecture",
    "Certificate",
    "Constraint",
    "Recipe",
    "certify",
    "constrain",
    "fold",
    "resolve_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
