"""What is done without a pipeline refuses what it cannot measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.models import load_tokenizer
from isotone.pipeline.export import evaluate_documents

ROOT = Path(__file__).parents[2]


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


def constrained(out: Path, *options: str) -> str | None:
    """Return what ``isotone constrain pocket-arcee`` says on stderr where it fails, None where it does not."""
    asked = ["constrain", "pocket-arcee", "--out", str(out), "--parametrization", "projection", *options]
    ended = subprocess.run([sys.executable, "-m", "isotone", *asked], capture_output=True, text=True, check=False)
    return ended.stderr if ended.returncode else None


def test_a_start_is_fitted_on_a_file_of_text(tmp_path: Path) -> None:
    """The fitted model keeps more of the original than one whose negative weights are dropped."""
    fitted_on, measured_on = tmp_path / "fitted_on.txt", tmp_path / "measured_on.txt"
    fitted_on.write_text((ROOT / "LICENSE").read_text())
    measured_on.write_text((ROOT / "CONTRIBUTING.md").read_text())
    text = ("--calibration", str(fitted_on), "--calibration-rows", "12")
    assert constrained(tmp_path / "fitted", "--layers", "first:1", "--initialization", "nnls", *text) is None
    assert constrained(tmp_path / "relu", "--layers", "first:1", "--initialization", "relu") is None
    assert json.loads((tmp_path / "fitted/certificate.json").read_text())["verdict"] == "strict"
    nll = {
        name: evaluate_documents(str(source), measured_on, "text", None, StopFlag())["nll"]["value"]
        for name, source in {n: tmp_path / n for n in ("fitted", "relu")}.items()
    }
    assert nll["fitted"] < nll["relu"]


def test_a_fitted_start_without_text_says_what_to_give(tmp_path: Path) -> None:
    said = constrained(tmp_path / "out", "--initialization", "nnls")
    assert said == "ERROR: --initialization nnls is fitted on text; give it with --calibration FILE\n"
    assert constrained(tmp_path / "out", "--calibrate", "--initialization", "relu") is not None
    (tmp_path / "short.txt").write_text("In the beginning was the word.")
    said = constrained(tmp_path / "out", "--initialization", "nnls", "--calibration", str(tmp_path / "short.txt"))
    assert said is not None
    assert "the calibration text is too short" in said
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_sent_to_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("In the beginning was the word.")
    with pytest.raises(UsageError, match=r"pocket-t5 is an encoder-decoder: .*evaluate pairs in a run"):
        evaluate_documents("pocket-t5", tmp_path / "a.txt", "text", None, StopFlag())
