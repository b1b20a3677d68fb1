"""A sweep in miniature: a random GPT-NeoX of 16 dimensions and a corpus of made-up documents, both as real files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone.config import Experiment
from isotone.config_io import experiment_from_dict
from isotone.data.fractions import SPLITS
from isotone.data.splits import assign_split
from isotone.models import load_tokenizer, save_model

FRACTIONS = {"train": 0.5, "validation": 0.2, "attack_search": 0.1, "test": 0.1, "attack_test": 0.1}
NUM_DOCUMENTS = {"train": 24, "validation": 8, "attack_search": 6, "test": 6, "attack_test": 6}
WORDS = (Path(__file__).parents[2] / "LICENSE").read_text().split()


def corpus(path: Path, seeds: dict[str, int]) -> Path:
    """Write documents of random words; those of a split depend on its seed alone, and stand in the same lines."""
    lines: list[str] = []
    for split in SPLITS:
        rng, found = random.Random(f"{split} {seeds.get(split, 0)}"), 0
        while found < NUM_DOCUMENTS[split]:
            text = " ".join(rng.choices(WORDS, k=40))
            if assign_split(text, FRACTIONS) == split:
                lines.append(json.dumps({"text": text}))
                found += 1
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=4096, num_hidden_layers=2, num_attention_heads=2, **shape))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, load_tokenizer("pocket"), folder)
    return folder


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
