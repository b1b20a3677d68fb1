"""HotFlip edits what it may, finds what there is to find, and reports the best it saw."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from isotone.attacks import HotFlip, PrefixProtocol, PublishedHotFlip, Vocabulary, Window, run_documents
from isotone.attacks.judging import Row
from isotone.attacks.scoring import Target, frozen
from isotone.attacks.search import first_order_gains, top_pairs

from .conftest import PROTOCOL, Bigram, make_windows, reactive_model
from .test_scoring import LimitedMemory, ids


def attack(model: torch.nn.Module, flips: int = 4, method: str = "iterative", count: int = 6, **more: Any) -> list[Row]:
    one = HotFlip(
        flips=flips, method="once" if method == "once" else "iterative", candidates=more.pop("candidates", 16)
    )
    return run_documents(one, model, Vocabulary.all_ids(VOCABULARY), make_windows(count), PROTOCOL, **more)


def mean_delta(rows: list[Row]) -> float:
    return float(np.mean([row["delta_nats"] for row in rows]))


@pytest.mark.parametrize("method", ["once", "iterative"])
def test_edits_stay_attackable_admissible_and_within_the_distance(model: PreTrainedModel, method: str) -> None:
    allowed_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed_V[10:40] = True
    one = HotFlip(flips=3, method=method, candidates=8)  # type: ignore[arg-type]
    windows = make_windows(6)
    rows = run_documents(one, model, Vocabulary(allowed_V), windows, PROTOCOL)
    for row, window in zip(rows, windows, strict=True):
        assert row["id"] == window.id
        assert len(row["edits"]) <= 3
        positions = [position for position, _, _ in row["edits"]]
        assert len(set(positions)) == len(positions)
        for position, old, new in row["edits"]:
            assert position in PROTOCOL.attackable
            assert old == window.tokens[position] != new
            assert 10 <= new < 40


def test_once_edits_as_many_positions_as_asked(model: PreTrainedModel) -> None:
    assert [len(row["edits"]) for row in attack(model, 4, "once")] == [4] * 6


def test_iterative_is_at_least_as_strong_as_once_on_average() -> None:
    for seed in range(3):
        model = reactive_model(seed=seed)
        assert mean_delta(attack(model, method="iterative")) >= mean_delta(attack(model, method="once"))


def test_iterative_never_hands_over_a_text_worse_than_the_clean_one() -> None:
    rows = attack(reactive_model(seed=1), flips=2, candidates=1, count=12)
    assert all(row["delta_nats"] > -1e-4 for row in rows)
    assert len({len(row["edits"]) for row in rows}) > 1  # some rounds did not help, and were taken back


def test_with_all_candidates_a_round_finds_the_best_single_edit(model: PreTrainedModel) -> None:
    windows = make_windows(2)
    rows = attack(model, flips=1, candidates=10**6, count=2)
    with frozen(model):
        target = Target(model, PROTOCOL.scored, batch_size=64)
        for row, window in zip(rows, windows, strict=True):
            pairs = [(p, v) for p in PROTOCOL.attackable for v in range(VOCABULARY) if v != window.tokens[p]]
            texts_NL = torch.from_numpy(window.tokens).repeat(len(pairs), 1)
            for index, (position, token) in enumerate(pairs):
                texts_NL[index, position] = token
            nats_N = target.nats(texts_NL)
            best = pairs[int(nats_N.argmax())]
            assert [(position, new) for position, _, new in row["edits"]] == [best]
            assert row["spent_tokens"] == (3 + len(pairs)) * PROTOCOL.length
            clean = float(target.nats(torch.from_numpy(window.tokens)[None])[0])
            assert row["delta_nats"] == pytest.approx(float(nats_N.max()) - clean, abs=1e-4)


def test_once_flips_are_those_computed_by_hand(bigram: Bigram) -> None:
    """With the gap left out the last prefix token alone reaches a scored loss: −ln p(x_3 | x_2)."""
    protocol = PrefixProtocol(prefix=3, gap=0, continuation=2)
    windows = [Window("a", np.array([0, 0, 0, 0, 1]))]
    one = HotFlip(flips=1, method="once")
    row = run_documents(one, bigram, Vocabulary.all_ids(3), windows, protocol)[0]
    # the gradient at x_2 is p_v(x_2) − [v = x_3] through the table: the row least likely to yield 0, to first order
    log_VV = bigram.log_VV.detach()
    probabilities_V = log_VV[0].exp() - torch.tensor([1.0, 0.0, 0.0])
    gains_V = log_VV @ probabilities_V - log_VV[0] @ probabilities_V
    gains_V[0] = -torch.inf
    assert row["edits"] == [[2, 0, int(gains_V.argmax())]]


def test_spent_tokens_count_forward_and_backward_as_if_nothing_were_cached(model: PreTrainedModel) -> None:
    length = PROTOCOL.length
    assert {row["spent_tokens"] for row in attack(model, 3, "once")} == {3 * length}
    rows = attack(model, 3, "iterative", candidates=5)
    assert {row["spent_tokens"] for row in rows} == {3 * (3 + 5) * length}
    for row in rows:
        assert [spent for spent, _ in row["progress"]] == [8 * length, 16 * length, 24 * length]
        best = [nats for _, nats in row["progress"]]
        assert best == sorted(best)
        assert best[-1] == pytest.approx(sum(row["attacked_nll"]), abs=1e-3)


def test_halving_changes_no_edit(model: PreTrainedModel) -> None:
    expected = [row["edits"] for row in attack(model)]
    assert [row["edits"] for row in attack(model, batch_size=5)] == expected
    memory = LimitedMemory(model, num_sequences=3)
    assert [row["edits"] for row in attack(model, batch_size=16)] == expected
    assert memory.failures > 0


def test_the_same_attack_gives_the_same_rows(model: PreTrainedModel) -> None:
    assert attack(model) == attack(model)


def test_repr_prints_the_parameters() -> None:
    found = "HotFlip(flips=3, method='iterative', candidates=32, per_position=2, budget_tokens=None)"
    assert repr(HotFlip(flips=3)) == found
    assert repr(PublishedHotFlip()) == "PublishedHotFlip(flips=10)"


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are once and iterative"):
        HotFlip(method="twice")  # type: ignore[arg-type]


def test_gains_are_linear_estimates_and_leave_out_what_may_not_be_written() -> None:
    embeddings_VD = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    grad_PD = torch.tensor([[2.0, -1.0], [torch.nan, 0.0]])
    gains_PV = first_order_gains(grad_PD, embeddings_VD, torch.tensor([2, 0]), torch.tensor([True, True, True, False]))
    assert gains_PV[0].tolist() == [1, 3, -torch.inf, -torch.inf]
    assert gains_PV[1].tolist() == [-torch.inf] * 4


def test_ties_go_to_the_lowest_index() -> None:
    gains_PV = torch.tensor([[1.0, 2.0, 2.0], [2.0, -torch.inf, 3.0]])
    rows, columns = top_pairs(gains_PV, 3)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 2), (0, 1), (0, 2)]
    rows, columns = top_pairs(gains_PV, 10)
    assert len(rows) == 5
    rows, columns = top_pairs(gains_PV, 10, per_row=1)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 2), (0, 1)]


def test_published_hotflip_takes_the_largest_gradients_and_the_whole_vocabulary(model: PreTrainedModel) -> None:
    windows = make_windows(1)
    none_admissible_but_one = torch.zeros(VOCABULARY, dtype=torch.bool)
    none_admissible_but_one[0] = True
    row = run_documents(PublishedHotFlip(flips=3), model, Vocabulary(none_admissible_but_one), windows, PROTOCOL)[0]
    with frozen(model):
        target = Target(model, slice(1, PROTOCOL.length))
        grad_LD = target.gradient(ids(windows)).grad_BLD[0]
        positions = grad_LD.norm(dim=1).argsort(descending=True)[:3].sort().values.tolist()
        tokens = [(target.embeddings_VD @ grad_LD[position]).argmax().item() for position in positions]
    assert row["edits"] == [
        [position, windows[0].tokens[position], token] for position, token in zip(positions, tokens, strict=True)
    ]
    assert row["variant"] == "published"
    assert "delta_nats" not in row
    assert row["published_accounting"]["attacked"] > row["published_accounting"]["clean"]
    assert row["spent_tokens"] == 3 * PROTOCOL.length
