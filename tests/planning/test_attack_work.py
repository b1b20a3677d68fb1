"""The work of attacks is counted as they spend it, token by token."""

from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from planned import planned
from tiny_models import tiny_model

from isotone.attacks import UniversalTriggers, Window, search_trigger
from isotone.attacks.vocabulary import Vocabulary
from isotone.pipeline.graph import Node
from isotone.planning.attack_work import trigger_tokens
from isotone.planning.work import node_work


@pytest.mark.parametrize("proposals", ["gradient", "surrogate"])
def test_a_trigger_search_spends_the_tokens_that_are_planned(proposals: Literal["gradient", "surrogate"]) -> None:
    words = [
        f"proposals={proposals}",
        "length=3",
        "candidates=6",
        "iterations=4",
        "restarts=2",
        "batch_size=2",
        "budget_tokens=4558",
    ]
    sizes = planned(
        *(f"attacks.triggers.{word}" for word in words),
        "attacks.num_search_documents=3",
        "attacks.protocol={prefix: 16, gap: 2, continuation: 16}",
    )
    model = tiny_model("gpt_neox")
    tokenizer = SimpleNamespace(bos_token_id=0)
    vocabulary = Vocabulary(torch.ones(64, dtype=torch.bool), tokenizer)
    windows = [Window(str(i), np.arange(34, dtype=np.int64) % 60 + i) for i in range(3)]
    config = sizes.experiment.attacks.triggers
    attack = UniversalTriggers(
        config.length, config.candidates, config.iterations, config.restarts, config.batch_size, config.budget_tokens,
        proposals=proposals,
    )  # fmt: skip
    assert search_trigger(attack, model, vocabulary, windows)["spent_tokens"] == trigger_tokens(sizes)


def test_further_attacks_are_planned_by_what_they_spend() -> None:
    sizes = planned("attacks.gcg.steps=5", "attacks.coordinate.rounds=3", "attacks.pgd.steps=4", "attacks.frequency={}")
    work = {
        kind: node_work(sizes, Node(kind, "monotonic")).attack for kind in ("gcg", "coordinate", "pgd", "frequency")
    }
    assert all(work.values())
    more = planned("attacks.gcg.steps=10", "attacks.coordinate.rounds=6", "attacks.pgd.steps=8", "attacks.frequency={}")
    for kind in ("gcg", "coordinate", "pgd"):
        assert 1.5 < node_work(more, Node(kind, "monotonic")).attack / work[kind] <= 2
    assert node_work(sizes, Node("gcg", "baseline")).attack > work["gcg"]  # the search documents
    assert node_work(sizes, Node("pgd", "baseline")).attack == work["pgd"]


def test_with_a_budget_all_searches_cost_about_the_same() -> None:
    words = [
        "attacks.gcg={}",
        "attacks.coordinate={}",
        "attacks.budget_tokens=200000",
        "attacks.hotflip.methods=[beam]",
    ]
    sizes = planned(*words)
    work = [node_work(sizes, Node(kind, "monotonic")).attack for kind in ("gcg", "coordinate", "hotflip")]
    assert max(work) / min(work) < 1.3


def test_replaying_is_planned_for_every_other_arm() -> None:
    two, three = (planned("attacks.transfer=true"), planned("attacks.transfer=true", "attacks.gcg={}"))
    assert node_work(three, Node("transfer", "baseline")).attack == pytest.approx(
        4 / 3 * node_work(two, Node("transfer", "baseline")).attack
    )


def test_a_probe_costs_a_forward_for_every_edit_and_every_token_that_is_tried() -> None:
    words = ["attacks.probe.edits=500", "attacks.probe.candidates=32"]

    def work(*more: str) -> float:
        return node_work(planned(*words, *more), Node("probe", "baseline")).attack

    sample = work("attacks.probe.oracle_tokens=1298")
    assert work() / sample == pytest.approx((500 + 4096) / (500 + 1298), rel=0.01)  # the gradient is little beside them
    assert work("attacks.probe.num_documents=4") == pytest.approx(work() / 2)
    many = work("attacks.probe.num_documents=400", "attacks.num_documents=40")
    assert many == pytest.approx(40 / 8 * work())  # no more than are attacked
