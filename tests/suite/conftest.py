"""Tiny models with tokenizers, in folders as users have them, and documents that they can read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from isotone import attack_models, records
from isotone.result_models import AttackSuiteResults

SMALL = [
    "attacks.hotflip.candidates=4", "attacks.random_draws=3", "attacks.gcg.candidates=4", "attacks.gcg.steps=2",
    "attacks.coordinate.candidates=4", "attacks.coordinate.rounds=2", "attacks.triggers.length=3",
    "attacks.triggers.candidates=4", "attacks.triggers.iterations=2", "attacks.triggers.restarts=2",
    "runtime.threads=1", "analysis.min_documents=2", "analysis.min_spent_tokens=1",
]  # fmt: skip
"""Settings with which every attack does little."""

LENGTH = 28
"""Tokens of the protocol that ``attack`` uses; triggers leave 16 of a text unscored."""

Attack = Callable[..., AttackSuiteResults]


def word_tokenizer(num_words: int = 64, fused: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w0, w1, …; fused: its texts have no blanks, so that only single words survive."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(num_words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if fused:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def save(folder: Path, model: Any, tokenizer: Any = None) -> str:
    """Write a model with its tokenizer as transformers does, and return its folder."""
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder)


def text(rng: np.random.Generator, num_words: int, least: int = 1) -> str:
    return " ".join(f"w{i}" for i in rng.integers(least, 64, num_words))


def spoken_by(model: Any, count: int = 10, num_words: int = 30) -> list[str]:
    """Return texts that a model says itself, so that it knows them better than chance."""
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1, 64, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(num_words - 1):
            shares_BV = model(ids_BL).logits[:, -1].softmax(-1)
            ids_BL = torch.cat([ids_BL, torch.multinomial(shares_BV, 1, generator=generator)], 1)
    return [" ".join(f"w{i}" for i in row) for row in ids_BL.tolist()]


def write_documents(path: Path, texts: list[str]) -> Path:
    records.write_bytes(path, records.dump_json_lines({"text": t} for t in texts))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of three models: one, another one, and the first again."""
    root = tmp_path_factory.mktemp("models")
    made = {"one": tiny_model("gpt_neox", seed=0, initializer_range=0.5)}
    made["other"] = tiny_model("gpt_neox", seed=1, initializer_range=0.5)
    made["same"] = tiny_model("gpt_neox", seed=0, initializer_range=0.5)
    return {name: save(root / name, model) for name, model in made.items()}


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of twelve texts of 30 to 41 tokens, one of which is much longer than the context."""
    rng = np.random.default_rng(0)
    texts = [text(rng, 30 + i) for i in range(11)] + [text(rng, 300)]
    return write_documents(tmp_path_factory.mktemp("documents") / "texts.jsonl", texts)


@pytest.fixture
def attack(documents: Path) -> Attack:
    """Return ``attack_models`` with small settings, on the documents unless others are given."""

    def attack_small(given: Any, out: Path | None = None, **options: Any) -> AttackSuiteResults:
        defaults: dict[str, Any] = {"documents": documents, "prefix": 10, "gap": 2, "continuation": 16, "flips": 2}
        asked = options.get("attacks", ("hotflip", "triggers", "gcg", "coordinate", "random"))
        own = [item for item in SMALL if item.split(".")[1] not in ("gcg", "coordinate") or item.split(".")[1] in asked]
        overrides = [*own, *options.pop("overrides", ())]
        return attack_models(given, out=out, **{**defaults, **options}, overrides=overrides)

    return attack_small
