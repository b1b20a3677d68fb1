"""What is done without a pipeline refuses what it cannot measure."""

import json
from pathlib import Path

import pytest

from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.models import load_tokenizer
from isotone.pipeline.export import evaluate_documents


def test_documents_are_tokenized_as_a_corpus_is(tmp_path: Path) -> None:
    """What reads like a special token is text."""
    text = "In the beginning <|endoftext|> was the word. " * 40
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer = load_tokenizer("pocket")
    assert tokenizer.eos_token in text
    found = evaluate_documents("pocket", tmp_path / "texts.jsonl", "text", None, StopFlag())
    assert found["num_tokens"] == len(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
    assert found["num_tokens"] > len(tokenizer(text, verbose=False)["input_ids"])


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_documents_without_text_are_refused_and_not_measured(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(UsageError, match=r"--documents: .*empty\.txt holds no text"):
        evaluate_documents("pocket", tmp_path / "empty.txt", "text", None, StopFlag())


def test_an_encoder_decoder_is_sent_to_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("In the beginning was the word.")
    with pytest.raises(UsageError, match=r"pocket-t5 is an encoder-decoder: .*evaluate pairs in a run"):
        evaluate_documents("pocket-t5", tmp_path / "a.txt", "text", None, StopFlag())
