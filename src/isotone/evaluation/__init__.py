"""What a model costs on text that nobody attacks."""

from isotone.evaluation.perplexity import evaluate_perplexity, summarize

__all__ = ["evaluate_perplexity", "summarize"]
