"""What a model costs on text that nobody attacks; names are loaded when first used, so that plans need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotone.evaluation.perplexity import evaluate_perplexity, summarize

__all__ = ["evaluate_perplexity", "summarize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("isotone.evaluation.perplexity"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
