"""The attack suite without a pipeline: given models, given documents, one folder that resumes."""

from isotone.suite.attack import attack_models

__all__ = ["attack_models"]
