"""Encoder-decoder models are attacked at their sources by the command, with all that causal models get."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_pairs import EOS, PAD, pair_tokenizer, random_pairs, write_pairs

from isotone import attack_models, records
from isotone.errors import Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.matching import divide_logits
from isotone.result_models import AttackSuiteResults

from .conftest import SMALL, save
from .test_attack import StopAfter, files

FLIPS = 2
PGD = ["attacks.pgd.steps=2", "attacks.probe={edits: 10, candidates: 3, num_documents: 3}"]
EVERYTHING = ("hotflip", "triggers", "gcg", "coordinate", "pgd", "frequency", "random")


def tiny(seed: int = 0) -> Any:
    return tiny_model("t5", seed=seed, initializer_factor=2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of a model, and of the same one less sure of itself."""
    root, unsure = tmp_path_factory.mktemp("t5"), tiny()
    divide_logits(unsure, 6.0)
    return {name: save(root / name, model, pair_tokenizer()) for name, model in (("one", tiny()), ("unsure", unsure))}


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    """Return pairs whose targets the model says itself, so that it knows them better than chance."""
    model, tokenizer, found = tiny(), pair_tokenizer(), []
    generator = torch.Generator().manual_seed(0)
    for pair in random_pairs(12):
        source_1S = torch.tensor([[*tokenizer(pair["source"])["input_ids"], EOS]])
        said = [PAD]
        for _ in range(5):
            with torch.no_grad():
                logits_V = model(input_ids=source_1S, decoder_input_ids=torch.tensor([said])).logits[0, -1]
            logits_V[:4] = -torch.inf
            said.append(int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator)))
        found.append({"source": pair["source"], "target": " ".join(tokenizer.convert_ids_to_tokens(said[1:]))})
    return found


@pytest.fixture(scope="module")
def documents(pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


def attack(given: Any, documents: Path, out: Path | None = None, **options: Any) -> AttackSuiteResults:
    asked = options.get("attacks", ("hotflip", "triggers", "gcg", "coordinate", "random"))
    own = [item for item in SMALL if item.split(".")[1] not in ("gcg", "coordinate") or item.split(".")[1] in asked]
    overrides = [*own, *options.pop("overrides", ())]
    return attack_models(given, documents, out, flips=FLIPS, **options, overrides=overrides)


def test_two_models_are_attacked_in_every_way_compared_and_judged_and_a_stop_changes_no_byte(
    models: dict[str, str], documents: Path, tmp_path: Path
) -> None:
    given = [models["one"], f"mono={models['unsure']}"]
    methods = "attacks.hotflip.methods=[once, iterative, beam, shuffled]"
    options: dict[str, Any] = {"attacks": EVERYTHING, "matched_loss": True, "overrides": [*PGD, methods]}
    results = attack(given, documents, tmp_path / "whole", **options)
    arm = results.arms["mono"]
    assert set(arm.hotflip["variants"]) == {"once", "iterative", "beam", "shuffled", "published", "random"}  # type: ignore[index]
    assert set(arm.attacks) == {"gcg", "coordinate", "pgd", "frequency", "ensemble"}
    assert arm.triggers is not None
    assert len(arm.triggers["trigger_ids"]) == 3
    assert [arm.hotflip["published_accounting"]["threshold"]] == [0.1]  # type: ignore[index]
    assert results.success_threshold is not None
    assert set(results.equivalence_margins) == {"hotflip", "gcg", "coordinate", "triggers", "ensemble"}
    assert results.arms["mono_matched"].matched_loss is not None
    [verdict] = results.verdicts
    assert verdict.verdict != "not_concluded"
    assert verdict.equivalent  # the same model but for how sure it is, and the control is as sure
    assert [against.control for against in verdict.against] == ["mono_matched"]
    assert {entry.attack for entry in results.transfer} >= {"hotflip", "gcg", "coordinate", "triggers"}
    kinds = {entry.kind for entry in results.decompositions if entry.arm == "mono"}
    assert kinds == {"nats", "bar", "success", "remainder"}
    measured = {index.name for index in results.masking["mono"].indices if index.measured}
    assert len(measured) >= 4
    compared = {(entry.metric, entry.attack) for entry in results.comparisons if entry.a == "mono"}
    assert {("nll", None), ("delta_nll", "hotflip"), ("delta_nll", "triggers"), ("delta_nll", "ensemble")} <= compared
    longest = max(len(pair["source"].split()) for pair in random_pairs(12)) + 1 + 3
    assert results.settings["protocol"]["source"] == longest  # room for the trigger, and no empty column
    with pytest.raises(Stopped):
        attack(given, documents, tmp_path / "resumed", **options, stop=StopAfter(40))
    with pytest.raises(Stopped):
        attack(given, documents, tmp_path / "resumed", **options, stop=StopAfter(70))
    attack(given, documents, tmp_path / "resumed", **options, stop=StopFlag())
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_edits_are_of_the_source_and_losses_of_the_reference(
    models: dict[str, str], documents: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    attack(models["one"], documents, tmp_path / "out", attacks=["hotflip"])
    texts = {f"pairs.jsonl:{i}": pair for i, pair in enumerate(pairs, 1)}
    rows = records.JsonLines(next((tmp_path / "out").rglob("hotflip.baseline.iterative.jsonl"))).read()
    assert rows
    for row in rows:
        pair = texts[row["id"]]
        assert row["source_tokens"] == len(pair["source"].split()) + 1
        assert row["scored_tokens"] == len(row["clean_nll"]) == len(pair["target"].split()) + 1
        assert all(position < row["source_tokens"] - 1 for position, _, _ in row["edits"])


def test_pairs_that_cannot_be_attacked_are_named_and_long_ones_are_cut_and_counted(
    models: dict[str, str], tmp_path: Path
) -> None:
    good = random_pairs(5)
    long = {"source": " ".join(f"w{i % 50}" for i in range(40)), "target": "w1 w2"}
    bad = [{"source": " ", "target": "w1"}, {"source": "w1 w2 w3", "target": ""}, {"source": "w4", "target": "w1"}]
    path = write_pairs(tmp_path / "mixed.jsonl", [*bad, *good, long, good[0]])
    results = attack(models["one"], path, attacks=["random"], overrides=["attacks.protocol.source=20"])
    assert results.documents["attack_test"] + results.documents["attack_search"] == 6
    assert results.documents["left_out"] == [
        {"id": "mixed.jsonl:1", "reason": "its source is empty"},
        {"id": "mixed.jsonl:2", "reason": "its target is empty"},
        {"id": "mixed.jsonl:3", "reason": "its source has 1 of the 2 tokens that attacks.hotflip.flips asks for"},
        {"id": "mixed.jsonl:10", "reason": "it is a copy of mixed.jsonl:4"},
    ]
    assert "1 of 6 pairs are longer than attacks.protocol.source (20)" in results.notes[-1]
    assert results.settings["protocol"]["source"] == 20
    [refused] = [write_pairs(tmp_path / "few.jsonl", bad)]
    with pytest.raises(UsageError, match=r"holds 0 usable pairs with 2 source tokens or more, 2 are needed"):
        attack(models["one"], refused, attacks=["random"])


def test_other_fields_are_named_and_wrong_ones_refused(models: dict[str, str], documents: Path, tmp_path: Path) -> None:
    renamed = [{"old": pair["source"], "new": pair["target"]} for pair in random_pairs(5)]
    path = write_pairs(tmp_path / "renamed.jsonl", renamed)
    asked: dict[str, Any] = {"attacks": ["random"]}
    results = attack(models["one"], path, source_field="old", target_field="new", **asked)
    assert results.documents["attack_test"] == 4
    with pytest.raises(UsageError, match="source"):
        attack(models["one"], path, **asked)
    with pytest.raises(UsageError, match=r"attacks.protocol.prefix: has no meaning for pairs"):
        attack(models["one"], documents, prefix=10, **asked)
    causal = save(tmp_path / "causal", tiny_model("gpt_neox"))
    with pytest.raises(UsageError, match="is no encoder-decoder and reads no pairs"):
        attack(causal, documents, source_field="source", **asked)
    with pytest.raises(UsageError, match="cannot be compared; attack them one by one"):
        attack([models["one"], f"causal={causal}"], documents, **asked)


def test_models_that_read_sources_as_other_tokens_are_refused(
    models: dict[str, str], documents: Path, tmp_path: Path
) -> None:
    tokenizer = pair_tokenizer()
    tokenizer.add_tokens(["w1 w2"])
    other = save(tmp_path / "other", tiny_model("t5"), tokenizer)
    with pytest.raises(UsageError, match="does not read texts as the same tokens"):
        attack(
            [models["one"], f"other={other}"],
            write_pairs(tmp_path / "p.jsonl", [{"source": f"w1 w2 w{i} w4", "target": "w1"} for i in range(5, 12)]),
            attacks=["random"],
        )
