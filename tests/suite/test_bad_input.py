"""What cannot be measured is named and missing on both sides of a comparison, never a success or a failure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from isotone.errors import UsageError

from .conftest import LENGTH, Attack, save, text, word_tokenizer, write_documents

POISON = 63
"""A word whose embedding is NaN in the broken model."""


def _refusal(attack: Attack, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        attack(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_empty_short_and_copied_documents_are_named(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    good = [text(rng, LENGTH + 1) for _ in range(6)]
    path = write_documents(tmp_path / "mixed.jsonl", ["", " \n", text(rng, 5), *good, good[0]])
    found = attack(models["one"], documents=path, attacks=["random"]).documents
    assert found["attack_test"] + found["attack_search"] == 6
    assert found["left_out"] == [
        {"id": "mixed.jsonl:1", "reason": "it is empty"},
        {"id": "mixed.jsonl:2", "reason": "it is empty"},
        {"id": "mixed.jsonl:3", "reason": f"it has 5 of the {LENGTH} tokens that attacks.protocol asks for"},
        {"id": "mixed.jsonl:10", "reason": "it is a copy of mixed.jsonl:4"},
    ]


def test_too_few_documents_are_refused_with_an_example(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = write_documents(tmp_path / "few.jsonl", ["w1 w2", text(rng, 40)])
    said = _refusal(attack, models["one"], documents=path)
    assert "holds 1 usable documents" in said
    assert "few.jsonl:1: it has 2 of the 28 tokens" in said
    own = write_documents(tmp_path / "own.jsonl", [text(rng, 40)])
    found = attack(models["one"], documents=path, search_documents=own, attacks=["random"])
    assert (found.documents["attack_test"], found.documents["attack_search"]) == (1, 1)
    assert "1 search document only" in found.notes[0]
    assert "there is no file" in _refusal(attack, models["one"], documents=tmp_path / "none.jsonl")


def test_search_documents_that_resemble_attacked_ones_are_left_out(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    test, fresh = [text(rng, 40) for _ in range(3)], text(rng, 40)
    documents = write_documents(tmp_path / "test.jsonl", test)
    search = write_documents(tmp_path / "search.jsonl", [test[0] + " w5", fresh])
    found = attack(models["one"], documents=documents, search_documents=search, attacks=["random"]).documents
    assert found["attack_search"] == 1
    assert {"id": "search.jsonl:1", "reason": "it resembles an attacked one"} in found["left_out"]


def test_texts_longer_than_the_context_are_cut_and_protocols_are_refused(
    attack: Attack, models: dict[str, str], documents: Path
) -> None:
    """One of the documents has 300 tokens for a context of 64."""
    assert max(len(line.split()) for line in documents.read_text().splitlines()) > 299
    arm = attack(models["one"], attacks=["random", "triggers"]).arms["baseline"]
    assert arm.triggers is not None
    assert arm.hotflip is not None
    assert arm.hotflip["missing"] == arm.triggers["missing"] == {}
    assert arm.evaluation["last"]["missing"] == []
    said = _refusal(attack, models["one"], continuation=60)
    assert "baseline reads 64 tokens, and attacks.protocol asks for 72" in said
    assert "--continuation" in said


def test_documents_on_which_a_model_returns_nan_are_missing_on_both_sides(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    broken = tiny_model("gpt_neox", seed=0, initializer_range=0.5)
    with torch.no_grad():
        broken.get_input_embeddings().weight[POISON] = torch.nan
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{i}" for i in rng.integers(1, POISON, 30)) for _ in range(8)]
    texts[:3] = [t.replace(t.split()[12], f"w{POISON}") for t in texts[:3]]
    own = write_documents(tmp_path / "own.jsonl", [text(rng, 40) for _ in range(3)])
    path = write_documents(tmp_path / "texts.jsonl", texts)
    results = attack(
        [models["one"], save(tmp_path / "broken", broken)],
        documents=path,
        search_documents=own,
        attacks=["hotflip"],
        overrides=["attacks.hotflip.methods=[once]"],
    )
    once = {arm: found.hotflip["variants"]["once"] for arm, found in results.arms.items()}  # type: ignore[index]
    assert (once["baseline"]["n"], once["broken"]["n"]) == (8, 5)
    assert once["broken"]["missing"] == {"the loss of the clean text is not a finite number": 3}
    compared = {(c.metric, c.attack, c.variant): (c.n, c.num_missing) for c in results.comparisons}
    assert compared["delta_nll", "hotflip", "once"] == (5, 3)
    assert compared["nll", None, None] == (5, 3)
    success = [c for c in results.comparisons if c.metric == "success_rate" and c.protocol == "prefix"]
    assert {(c.n, c.only_a, c.only_b) for c in success} == {(5, 0, 0)}  # but for NaN the models are the same


def test_a_model_of_nan_alone_has_no_figures_and_no_verdict(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    broken = tiny_model("gpt_neox", seed=0)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(torch.nan)
    folder = save(tmp_path / "broken", broken)
    results = attack([models["one"], folder], num_documents=4, matched_loss=True)
    arm = results.arms["broken"]
    assert arm.perplexity is None
    assert arm.hotflip is not None
    assert (arm.hotflip["n"], arm.hotflip["success_rate"]) == (0, None)
    assert all(c.a != "broken" for c in results.comparisons)
    assert results.verdicts[0].verdict == "not_concluded"
    assert "not a finite number" in results.verdicts[0].excluded[0].reason
    alone = attack(folder, num_documents=4)
    assert alone.success_threshold is None
    assert alone.arms["baseline"].triggers is not None


def test_a_tokenizer_without_round_trip_leaves_text_space_missing(attack: Attack, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox", seed=0, initializer_range=0.5)
    folder = save(tmp_path / "fused", model, word_tokenizer(fused=True))
    results = attack(folder, attacks=["hotflip"])
    entry = results.arms["baseline"].hotflip
    assert entry is not None
    assert entry["n"] == 10
    assert entry["delta_nll"] is not None
    assert entry["text_space"]["survived"] == 0
    assert entry["text_space"]["missing"] == 10
    [measured] = [
        m for m in results.measurements if m.protocol == "prefix_text_space" and m.variant == entry["variant"]
    ]
    assert (measured.n, measured.num_missing, measured.value) == (0, 10, None)


def test_models_that_read_other_tokens_are_refused(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    other = save(tmp_path / "fewer", tiny_model("gpt_neox"), word_tokenizer(num_words=60))
    said = _refusal(attack, [models["one"], other])
    assert "does not read texts as the same tokens" in said
    more = save(tmp_path / "more", tiny_model("gpt_neox"), word_tokenizer(num_words=70))
    assert "has token 69, but the model 64 embeddings" in _refusal(attack, more)
