import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isotone.config import Data
from isotone.data.packing import prepare_data
from isotone.interruption import StopFlag

TEXT = "the cat sat on a mat and saw dogs run home past old trees while rain fell over green hills in may"
WORDS = TEXT.split(" ")


def random_texts(count: int, seed: int = 0, num_words: int = 30) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, num_words)) + f" {i}." for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(random_texts(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<eos>", eos_token="<eos>")


Pack = Callable[..., dict[str, Any]]


@pytest.fixture
def pack(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Pack:
    """Pack a file into ``tmp_path / name`` with short rows."""

    def run(source: Path | str, name: str = "packed", stop: StopFlag | None = None, **settings: Any) -> dict[str, Any]:
        options = {k: settings.pop(k) for k in ("vocab_size", "progress") if k in settings}
        chosen = settings.pop("tokenizer", tokenizer)
        config = Data(**{"source": str(source), "sequence_length": 16, **settings})
        return prepare_data(config, chosen, tmp_path / name, max_context=64, stop=stop or StopFlag(), **options)

    return run
