"""A sweep in miniature, on real files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sweep import FRACTIONS, corpus, make_model

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


AXES: dict[str, Any] = {
    "monotonic": {
        "constraint.parametrization": ["projection", "softplus"],
        "constraint.initialization": ["absolute", "relu"],
        "training.lr": [1e-3, 1e-2],
    }
}
"""Six combinations that fit and two that do not."""

SMALL: dict[str, Any] = {
    "monotonic": {"constraint.parametrization": ["projection", "softplus"], "training.lr": [1e-3, 1e-2]}
}
"""Two that fit, and two that do not, as the arm starts from relu."""

Tiny = Callable[..., Experiment]


@pytest.fixture(scope="session")
def tree(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    documents = corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl", {})
    return {
        "name": "tiny",
        "model": {"source": str(model_folder)},
        "data": {"source": str(documents), "sequence_length": 32, "fractions": FRACTIONS},
        "training": {"epochs": 0.5, "micro_batch": 4, "accumulation": 1, "lr": 1e-3, "validation_rows": 2},
        "arms": {
            "baseline": {},
            "monotonic": {"constraint": {"parametrization": "projection", "initialization": "relu"}},
        },
        "attacks": {"protocol": {"prefix": 16, "gap": 4, "continuation": 16}},
        "runtime": {"threads": 1, "device": "cpu"},
        "sweep": {"arms": SMALL},
    }


@pytest.fixture
def tiny(tree: dict[str, Any]) -> Tiny:
    """Return a function that gives the experiment, with top-level keys replaced."""
    return lambda **changed: experiment_from_dict({**tree, **changed})
