"""Pairs of a few words, a tokenizer for them, and random T5s: what tests of encoder-decoders share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = 0, 1
WORDS = [f"w{i}" for i in range(60)]


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 60 words with T5's special tokens: <pad> 0, </s> 1, <unk> 2."""
    names = ["<pad>", "</s>", "<unk>", "⁇", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def random_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return pairs of which the target is the source's beginning, one word on."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        chosen = rng.integers(0, 59, rng.integers(6, 14))
        target = [WORDS[i + 1] for i in chosen[: len(chosen) // 2]]
        pairs.append({"source": " ".join(WORDS[i] for i in chosen), "target": " ".join(target)})
    return pairs


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    """Write pairs as JSON lines."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
