"""The judge says what was computed by hand, and exactly nothing for a text without edits."""

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from isotone.attacks import PrefixProtocol, Vocabulary, Window
from isotone.attacks.interface import Problem
from isotone.attacks.judging import Row, judge
from isotone.attacks.scoring import Target, frozen

from .conftest import PROTOCOL, Bigram, make_windows

SMALL = PrefixProtocol(prefix=3, gap=1, continuation=2)
CLEAN = [0, 1, 2, 0, 1, 2]
"""p: 0→1 .25, 1→2 .8, 2→0 .25, 0→1 .25, 1→2 .8"""


def judged(model: torch.nn.Module, attacked: list[int], edits_scored: bool = False) -> Row:
    problem = Problem(Target(model, SMALL.scored), SMALL, Vocabulary.all_ids(3))
    with frozen(model):
        return judge(problem, [Window("a", np.array(CLEAN))], torch.tensor([attacked]), edits_scored)[0]


def test_a_text_without_edits_changes_nothing_exactly(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    windows = make_windows(5)
    problem = Problem(Target(model, PROTOCOL.scored, batch_size=3), PROTOCOL, vocabulary)
    attacked_BL = torch.stack([torch.from_numpy(window.tokens) for window in windows])
    attacked_BL[2, 4] += 1  # a neighbour in the batch that is edited
    with frozen(model):
        rows = judge(problem, windows, attacked_BL)
    for row in rows[:2] + rows[3:]:
        assert row["delta_nats"] == 0
        assert row["clean_nll"] == row["attacked_nll"]
        assert row["edits"] == []
        assert row["published_accounting"]["degradation"] == 0
    assert rows[2]["delta_nats"] != 0


def test_an_edit_of_the_last_attackable_token_counts_in_the_published_accounting_only(bigram: Bigram) -> None:
    row = judged(bigram, [0, 1, 1, 0, 1, 2])
    assert row["edits"] == [[2, 2, 1]]
    assert row["delta_nats"] == 0
    assert row["delta_by_offset"]["0-7"] == {"nats": 0, "tokens": 2}
    assert row["delta_by_offset"]["gap"] == {"nats": pytest.approx(math.log(0.25 / 0.1)), "tokens": 1}
    clean = -math.log(0.25 * 0.8 * 0.25 * 0.25 * 0.8) / 5
    attacked = -math.log(0.25 * 0.1 * 0.1 * 0.25 * 0.8) / 5
    accounting = row["published_accounting"]
    assert accounting["clean"] == pytest.approx(clean, rel=1e-6)
    assert accounting["attacked"] == pytest.approx(attacked, rel=1e-6)
    assert accounting["degradation"] == pytest.approx((attacked - clean) / clean, rel=1e-6)
    assert accounting["flipped"] == pytest.approx(math.log(0.8 / 0.1) / 5, rel=1e-6)
    assert accounting["untouched"] == pytest.approx(math.log(0.25 / 0.1) / 5, rel=1e-6)
    assert accounting["tokens"] == 5


def test_an_edit_of_the_last_token_is_refused_in_the_primary_protocol_and_raises_the_published_loss(
    bigram: Bigram,
) -> None:
    attacked = [0, 1, 2, 0, 1, 0]
    with pytest.raises(ValueError, match="outside of the attackable positions"):
        judged(bigram, attacked)
    row = judged(bigram, attacked, edits_scored=True)
    assert "delta_nats" not in row
    assert row["published_accounting"]["flipped"] == pytest.approx(math.log(0.8 / 0.1) / 5, rel=1e-6)
    assert row["published_accounting"]["untouched"] == 0


def test_losses_of_all_tokens_are_kept_in_order(bigram: Bigram) -> None:
    row = judged(bigram, [0, 2, 2, 0, 1, 2])
    clean = [-math.log(p) for p in (0.25, 0.8, 0.25, 0.25, 0.8)]
    attacked = [-math.log(p) for p in (0.25, 0.25, 0.25, 0.25, 0.8)]
    assert row["context_clean_nll"] + row["clean_nll"] == pytest.approx(clean)
    assert row["context_attacked_nll"] + row["attacked_nll"] == pytest.approx(attacked)
    assert len(row["clean_nll"]) == row["scored_tokens"] == 2
    assert row["top1"] == {"clean": 1, "attacked": 1}  # 1→2 is the most likely, 0→1 is not


def test_a_loss_that_is_no_number_makes_the_document_missing(bigram: Bigram) -> None:
    with torch.no_grad():
        bigram.log_VV[2, 2] = -torch.inf
    row = judged(bigram, [0, 2, 2, 0, 1, 2])
    assert row == {"status": "missing", "reason": "the loss of the attacked text is not a finite number"}
    assert judged(bigram, [0, 1, 1, 0, 1, 2])["status"] == "ok"


class Merging:
    """A tokenizer in which the text of 1 1 is read as 2."""

    bos_token_id = None

    def decode(self, ids: list[int], **unused: object) -> str:
        return "".join(map(str, ids)).replace("11", "2")

    def __call__(self, text: str, **unused: object) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}


@pytest.mark.parametrize(
    ("attacked", "survives", "text_space"),
    [
        ([0, 2, 2, 0, 1, 2], True, None),
        ([0, 1, 1, 0, 1, 2], False, {"delta_nats": 0.0}),
    ],
)
def test_texts_that_do_not_survive_are_scored_as_what_they_become(
    bigram: Bigram, attacked: list[int], survives: bool, text_space: dict | None
) -> None:
    vocabulary = Vocabulary(torch.ones(3, dtype=torch.bool), Merging())
    problem = Problem(Target(bigram, SMALL.scored), SMALL, vocabulary)
    with frozen(bigram):
        row = judge(problem, [Window("a", np.array(CLEAN))], torch.tensor([attacked]))[0]
    assert row["round_trip"] is survives
    assert row["text_space"] == (text_space if text_space is None else pytest.approx(text_space, abs=1e-6))


def test_scored_tokens_that_are_read_differently_leave_the_text_space_figure_missing(bigram: Bigram) -> None:
    protocol = PrefixProtocol(prefix=2, gap=0, continuation=2)
    vocabulary = Vocabulary(torch.ones(3, dtype=torch.bool), Merging())
    problem = Problem(Target(bigram, protocol.scored), protocol, vocabulary)
    with frozen(bigram):
        row = judge(problem, [Window("a", np.array([0, 2, 1, 0]))], torch.tensor([[0, 1, 1, 0]]))[0]
    assert row["text_space"] == {"missing": "the scored tokens are tokenized differently"}
