"""Given models are attacked as the arms of a run are, and interruptions change no byte of what is written."""

from pathlib import Path

import jsonschema
import pytest
import torch
from tiny_models import tiny_model

from isotone import records
from isotone.constraint import constrain, fold
from isotone.errors import BlockedError, Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.matching import divide_logits
from isotone.pipeline.lease import lease
from isotone.result_models import json_schema

from .conftest import Attack, save, spoken_by, write_documents


class StopAfter(StopFlag):
    """Asks for a stop at the n-th place where a stop is possible."""

    def __init__(self, checks: int):
        super().__init__()
        self.left = checks

    def check(self, what: str) -> None:
        self.left -= 1
        if self.left < 0:
            self.request("test")
        super().check(what)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_model_gets_every_figure_of_a_run_in_its_form(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    results = attack(models["one"], tmp_path / "out")
    written = records.read_json(tmp_path / "out/attack_results.json")
    jsonschema.validate(written, json_schema("attack_results"))
    arm = results.arms["baseline"]
    assert set(arm.hotflip["variants"]) == {"once", "iterative", "published", "random"}  # type: ignore[index]
    assert set(arm.attacks) == {"gcg", "coordinate", "ensemble"}
    assert arm.triggers is not None
    deltas = [entry["delta_nll"] for entry in (arm.attacks["gcg"], arm.attacks["coordinate"])]
    assert arm.attacks["ensemble"]["delta_nll"] >= max(deltas)
    assert results.success_threshold is not None
    assert set(results.equivalence_margins) == {"hotflip", "gcg", "coordinate", "triggers", "ensemble"}
    assert (results.documents["attack_test"], results.documents["attack_search"]) == (10, 2)
    assert results.comparisons == results.verdicts == results.transfer == []
    summary = (tmp_path / "out/attack_summary.txt").read_text()
    assert "10 attacked, 2 searched on" in summary
    assert "gpt_neox" in summary
    assert str(tmp_path) not in summary + str(written)


def test_only_what_is_asked_for_is_made(attack: Attack, models: dict[str, str]) -> None:
    """τ and margins need random edits and search documents all the same."""
    results = attack(models["one"], attacks=["coordinate"])
    arm = results.arms["baseline"]
    assert (arm.hotflip, arm.triggers, set(arm.attacks)) == (None, None, {"coordinate", "ensemble"})
    assert results.success_threshold is not None
    assert set(results.equivalence_margins) == {"coordinate", "ensemble"}
    bound = attack([models["one"], models["same"]], attacks=["pgd", "frequency"], num_documents=3)
    assert set(bound.arms["same"].attacks) == {"pgd", "frequency", "ensemble"}
    assert bound.arms["same"].attacks["pgd"]["upper_bound"] is True
    assert bound.transfer == []
    alone = attack(models["one"], attacks=["random"]).arms["baseline"]
    assert set(alone.hotflip["variants"]) == {"random"}  # type: ignore[index]


def test_several_models_are_compared_and_transferred(attack: Attack, models: dict[str, str]) -> None:
    results = attack([models["one"], f"second={models['other']}", models["same"]], num_documents=6)
    arms = ("baseline", "second", "same")
    assert tuple(results.arms) == arms
    attacks = [("hotflip", "once"), ("hotflip", "iterative"), ("gcg", "top_k"), ("coordinate", "random")]
    attacks.append(("triggers", "universal"))
    cells = {(c.source, c.target, c.attack, c.variant): c.value for c in results.transfer}
    assert set(cells) == {(source, target, *key) for source in arms for target in arms for key in attacks}
    own = results.arms["second"].attacks["gcg"]["delta_nll"]
    assert cells["second", "second", "gcg", "top_k"] == pytest.approx(own)
    assert all(cells["baseline", "same", *key] == cells["baseline", "baseline", *key] for key in attacks)
    confirmatory = {(c.a, c.attack) for c in results.comparisons if c.family == "confirmatory"}
    measures = (None, "hotflip", "triggers", "gcg", "coordinate")
    assert confirmatory == {(arm, measure) for arm in arms[1:] for measure in measures}
    assert [v.arm for v in results.verdicts] == ["second", "same"]
    assert results.differences_between_arms[0]["key"] == "model"


def test_a_model_against_itself_is_equivalent_by_exactly_nothing(attack: Attack, models: dict[str, str]) -> None:
    probe = ["attacks.probe.edits=10", "attacks.probe.candidates=4", "attacks.probe.num_documents=3"]
    results = attack([models["one"], models["same"]], attacks=["hotflip", "random"], overrides=probe)
    measured = {index.name: index.difference for index in results.masking["same"].indices if index.measured}
    assert measured["first order"] == measured["oracle"] == 0
    assert {c.difference for c in results.comparisons} == {0.0}
    assert results.verdicts[0].verdict == "equivalent"


def test_a_shifted_twin_is_equivalent(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    twin = tiny_model("gpt_neox", seed=0, initializer_range=0.5)
    constrain(twin, "mlp_both", "projection", "shift", will_train=False)
    fold(twin)
    results = attack([models["one"], save(tmp_path / "twin", twin)], attacks=["hotflip", "coordinate"])
    deltas = [c.difference for c in results.comparisons if c.metric == "delta_nll" and c.protocol == "prefix"]
    assert max(map(abs, deltas)) < 0.005
    assert results.verdicts[0].verdict == "equivalent"
    certificate = results.arms["twin"].certificate
    assert certificate is not None
    assert certificate["verdict"] == "vacuous"


def test_no_verdict_at_different_losses_but_through_controls(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    """A model that is only less sure of itself is as robust as the baseline at its loss, and nothing else is said."""
    unsure = tiny_model("gpt_neox", seed=0, initializer_range=0.5)
    own_texts = write_documents(tmp_path / "own.jsonl", spoken_by(unsure))  # on random ones, less sure is better
    divide_logits(unsure, 1.5)
    said: list[str] = []
    given = [models["one"], save(tmp_path / "unsure", unsure)]
    asked = {"documents": own_texts, "attacks": ["hotflip", "random"], "say": said.append}
    without = attack(given, **asked)
    assert (without.verdicts[0].clean_difference or 0) > 0.02
    assert without.verdicts[0].verdict == "not_concluded"
    assert any("--matched-loss" in line for line in said)
    results = attack(given, matched_loss=True, **asked)
    matched = results.arms["unsure_matched"].matched_loss or {}
    assert matched["reachable"], matched
    assert matched["parameter"] == pytest.approx(1.5, abs=0.02)
    [verdict] = results.verdicts
    assert [entry.control for entry in verdict.against] == ["unsure_matched"]
    assert verdict.verdict == "equivalent"
    # a model can only be damaged: the other way round it is the arm that is brought to the baseline's loss
    back = attack(given[::-1], matched_loss=True, **asked)
    assert (back.arms["one_matched"].matched_loss or {})["start"] == "one"
    assert back.verdicts[0].verdict == "equivalent"


def test_a_model_that_reads_nothing_is_not_called_robust(
    attack: Attack, models: dict[str, str], tmp_path: Path
) -> None:
    """It says words as often as they are said, whatever stands before; at its loss the baseline still listens."""
    texts = spoken_by(tiny_model("gpt_neox", seed=0, initializer_range=0.5), count=40)
    own_texts, unigram = write_documents(tmp_path / "own.jsonl", texts), tiny_model("gpt_neox", initializer_range=0.5)
    counts_V = torch.bincount(torch.tensor([int(word[1:]) for t in texts for word in t.split()]), minlength=64)
    with torch.no_grad():
        unigram.gpt_neox.final_layer_norm.weight.zero_()
        logits_V1 = (counts_V + 1).float().log()[:, None]
        unigram.gpt_neox.final_layer_norm.bias.copy_(
            torch.linalg.lstsq(unigram.lm_head.weight, logits_V1).solution[:, 0]
        )
    given = [models["one"], save(tmp_path / "unigram", unigram)]
    results = attack(given, documents=own_texts, attacks=["hotflip", "random"], matched_loss=True)
    [verdict] = results.verdicts
    [against] = verdict.against
    assert against.remainder.ci95 is not None
    assert against.remainder.ci95[0] > 0  # harmed less at the same clean loss, in every document
    assert against.context_arm == 0
    assert verdict.verdict == "not_concluded"
    assert "unigram is harmed less, but hardly reads what is attacked" in verdict.sentence


def test_a_stop_anywhere_changes_no_byte(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    given = [models["one"], f"b={models['other']}"]
    asked = {"attacks": ["hotflip", "triggers", "gcg"], "matched_loss": True, "num_documents": 4}
    asked["overrides"] = ["attacks.batch_documents=2"]
    attack(given, tmp_path / "whole", **asked)
    stops = 0
    for allowed in (0, 1, *range(2, 300, 17)):
        try:
            attack(given, tmp_path / "stopped", stop=StopAfter(allowed), **asked)
            break
        except Stopped:
            stops += 1
            assert not (tmp_path / "stopped/attack_results.json").exists()
    assert stops >= 5
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_folder_takes_more_and_keeps_what_is_there(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    attack(models["one"], tmp_path / "grown", attacks=["hotflip"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "grown/results").rglob("*.jsonl")}
    given = [models["one"], models["other"]]
    attack(given, tmp_path / "grown", attacks=["hotflip", "coordinate"])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    attack(given, tmp_path / "at_once", attacks=["hotflip", "coordinate"])
    assert files(tmp_path / "grown") == files(tmp_path / "at_once")
    attack(models["one"], tmp_path / "grown", attacks=["hotflip"])  # less is possible too, and forgets nothing
    with pytest.raises(UsageError, match=r"attacks\.coordinate\.rounds was 2, is now 3"):
        attack(models["one"], tmp_path / "grown", attacks=["coordinate"], overrides=["attacks.coordinate.rounds=3"])


def test_another_request_is_refused_and_never_mixed(
    attack: Attack, models: dict[str, str], documents: Path, tmp_path: Path
) -> None:
    out, asked = tmp_path / "out", ["hotflip"]
    attack(models["one"], out, attacks=asked)
    before = files(out)
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(documents.read_bytes().replace(b"w1 ", b"w2 ", 1))
    for options, found in (
        ({"given": models["other"]}, r"models\.baseline\.files\.model\.safetensors was"),
        ({"documents": changed}, r"documents\.sha256 was"),
        ({"flips": 3}, r"settings\.hotflip\.flips was 2, is now 3"),
        ({"seed": 1}, "seed was 42, is now 1"),
        ({"overrides": ["runtime.threads=2"]}, r"runtime\.threads was 1, is now 2"),
        ({"search_documents": documents}, "documents|search"),
    ):
        with pytest.raises(UsageError, match=found) as caught:
            attack(**{"given": models["one"], "out": out, "attacks": asked} | options)
        assert "\n" not in str(caught.value)
    assert files(out) == before


def test_a_folder_that_is_worked_in_is_left_alone(attack: Attack, models: dict[str, str], tmp_path: Path) -> None:
    with (
        lease(tmp_path / "out/leases/attack.json", "attack"),
        pytest.raises(BlockedError, match="is being worked on by process"),
    ):
        attack(models["one"], tmp_path / "out")
