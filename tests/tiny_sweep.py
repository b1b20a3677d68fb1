"""A random GPT-NeoX of 16 dimensions and a corpus of made-up documents, as real files: what a sweep is tried on."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone.data.fractions import SPLITS
from isotone.data.splits import assign_split
from isotone.models import load_tokenizer, save_model

FRACTIONS = {"train": 0.5, "validation": 0.2, "attack_search": 0.1, "test": 0.1, "attack_test": 0.1}
NUM_DOCUMENTS = {"train": 24, "validation": 8, "attack_search": 6, "test": 6, "attack_test": 6}
WORDS = (Path(__file__).parents[1] / "LICENSE").read_text().split()


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


def make_model(folder: Path) -> Path:
    """Write the model and its tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=4096, num_hidden_layers=2, num_attention_heads=2, **shape))
    save_model(model, load_tokenizer("pocket"), folder)
    return folder
