"""isotone: what a monotone feed-forward network buys in a language model, and what it costs.

    import isotone

    model = isotone.load_model("pocket")
    constraint = isotone.constrain(model, scope="mlp_both", parametrization="scaled_softplus", initialization="shift")
    isotone.fold(model)
    print(isotone.certify(model).verdict)  # vacuous: on a LayerNorm model the order never meets two inputs

Names are loaded when they are first used, so that ``import isotone`` and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotone import attacks
    from isotone.config_io import load_experiment
    from isotone.constraint import Certificate, Constraint, certify, constrain, fold
    from isotone.models import load_model, load_tokenizer, save_model
    from isotone.suite import attack_models

_HOME = {
    "Certificate": "isotone.constraint",
    "Constraint": "isotone.constraint",
    "certify": "isotone.constraint",
    "attack_models": "isotone.suite",
    "constrain": "isotone.constraint",
    "fold": "isotone.constraint",
    "load_experiment": "isotone.config_io",
    "load_model": "isotone.models",
    "load_tokenizer": "isotone.models",
    "save_model": "isotone.models",
}

__all__ = [
    "Certificate",
    "Constraint",
    "attack_models",
    "attacks",
    "certify",
    "constrain",
    "fold",
    "load_experiment",
    "load_model",
    "load_tokenizer",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "attacks":
        return import_module("isotone.attacks")
    raise AttributeError(f"module 'isotone' has no attribute {name!r}")
