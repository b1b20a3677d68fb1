"""A probe's predictions are the gradient's, its changes the model's, and its edits the same for all arms."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from isotone.attacks import Vocabulary, Window
from isotone.attacks.probe import Probe, probe_documents
from isotone.attacks.protocol import PrefixProtocol
from isotone.attacks.scoring import Target, frozen
from isotone.errors import IsotoneError, Stopped
from isotone.evidence import Evidence
from isotone.masking import minus_rank_correlation
from isotone.records import JsonLines

from .conftest import PROTOCOL, Bigram, make_windows, reactive_model
from .test_running import StopAfter

PROBE = Probe(edits=30, candidates=5)


def test_changes_are_those_of_the_model(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    [window] = make_windows(1)
    [row] = probe_documents(PROBE, model, vocabulary, [window], PROTOCOL)
    ids_L = torch.from_numpy(window.tokens)
    with frozen(model):
        target = Target(model, PROTOCOL.scored)
        all_VL = ids_L.repeat(len(vocabulary.ids_N), 1)
        all_VL[:, row["position"]] = vocabulary.ids_N
        change_V = target.nats(all_VL) - target.nats(ids_L[None])
    assert row["oracle"]["oracle"] == pytest.approx(float(change_V.max()), abs=1e-4)
    assert max(row["oracle"]["gradient"], row["oracle"]["random"]) <= row["oracle"]["oracle"]
    assert len(row["true"]) == len(row["first_order"]) == 30
    assert row["spent_tokens"] == PROTOCOL.length * (3 + 30 + len(vocabulary.ids_N))


def test_predictions_are_the_gradients_own(bigram: Bigram) -> None:
    """ln p is linear in a one-hot embedding up to the softmax, so at a small step prediction and change agree."""
    protocol = PrefixProtocol(prefix=3, gap=0, continuation=2)
    window = Window("d", torch.tensor([0, 1, 2, 0, 1]).numpy())
    [row] = probe_documents(Probe(edits=40, candidates=2), bigram, Vocabulary.all_ids(3), [window], protocol)
    # token 2 alone is read when the first scored token is predicted; what is before it changes nothing
    true, predicted = torch.tensor(row["true"]), torch.tensor(row["first_order"])
    assert bool((predicted[true == 0] == 0).all())
    table = bigram.log_VV.detach().softmax(dim=1)
    gradient_V = bigram.log_VV.detach() @ table[2] - bigram.log_VV.detach()[:, 0]  # of −ln p(0 | ·) at token 2
    expected = {round(float(gradient_V[v] - gradient_V[2]), 5) for v in (0, 1)}
    assert {round(float(p), 5) for p in predicted[true != 0]} == expected


def test_every_arm_is_asked_the_same(vocabulary: Vocabulary) -> None:
    windows = make_windows(3)
    one, two = (probe_documents(PROBE, reactive_model(seed=s), vocabulary, windows, PROTOCOL) for s in (0, 1))
    assert [row["position"] for row in one] == [row["position"] for row in two]
    assert one != two
    alone = probe_documents(PROBE, reactive_model(), vocabulary, windows[2:], PROTOCOL)[0]
    assert alone["first_order"] == one[2]["first_order"]


@pytest.mark.parametrize("allowed", range(3, 9))
def test_a_probe_that_was_stopped_anywhere_goes_on_to_the_same_bytes(
    model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path, allowed: int
) -> None:
    windows, whole, log = make_windows(3), JsonLines(tmp_path / "whole.jsonl"), JsonLines(tmp_path / "resumed.jsonl")
    rows = probe_documents(PROBE, model, vocabulary, windows, PROTOCOL, log=whole)
    with pytest.raises(Stopped, match=f"probe after {allowed // 3} of 3 documents stopped safely"):
        probe_documents(PROBE, model, vocabulary, windows, PROTOCOL, log=log, stop=StopAfter(allowed))
    assert len(log.read()) == allowed // 3  # a document is looked at three times
    with log.path.open("a") as file:
        file.write('{"id": "torn')
    assert probe_documents(PROBE, model, vocabulary, windows, PROTOCOL, log=log) == rows
    assert log.path.read_bytes() == whole.path.read_bytes()


def test_a_log_of_other_documents_is_refused(model: PreTrainedModel, vocabulary: Vocabulary, tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    probe_documents(PROBE, model, vocabulary, make_windows(2)[1:], PROTOCOL, log=log)
    with pytest.raises(IsotoneError, match="rows of other documents"):
        probe_documents(PROBE, model, vocabulary, make_windows(2), PROTOCOL, log=log)


def test_an_oracle_of_fewer_tokens_says_so_and_finds_no_more(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    few = Probe(edits=30, candidates=5, oracle_tokens=20)
    [all_tokens] = probe_documents(PROBE, model, vocabulary, make_windows(1), PROTOCOL)
    [sample] = probe_documents(few, model, vocabulary, make_windows(1), PROTOCOL)
    assert (all_tokens["tried"], sample["tried"], sample["admissible"]) == (64, 20, 64)
    assert sample["oracle"]["oracle"] <= all_tokens["oracle"]["oracle"]
    assert sample["oracle"]["random"] == pytest.approx(all_tokens["oracle"]["random"], abs=1e-4)  # the same tokens
    assert sample["spent_tokens"] == PROTOCOL.length * (3 + 30 + 20)


def test_losses_that_are_no_numbers_are_missing(vocabulary: Vocabulary) -> None:
    broken = reactive_model()
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    [row] = probe_documents(PROBE, broken, vocabulary, make_windows(1), PROTOCOL)
    assert row["status"] == "missing"
    assert minus_rank_correlation([row]) == {}


def test_rows_are_what_the_signs_of_masking_read(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    rows = probe_documents(PROBE, model, vocabulary, make_windows(2), PROTOCOL)
    found = minus_rank_correlation(Evidence({}, probes=rows).probes)
    assert not isinstance(found, str)
    assert list(found) == [row["id"] for row in rows]
    assert all(-1 <= value <= 1 for value, _ in found.values())
