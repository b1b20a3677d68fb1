"""An encoder-decoder is attacked at the source and judged by the reference; what attacks promise holds there, too."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from isotone.attacks import (
    DocumentAttack,
    SourceProtocol,
    UniversalTriggers,
    Vocabulary,
    Window,
    evaluate_trigger,
    replay,
    run_documents,
    search_trigger,
)
from isotone.attacks.interface import Problem, State
from isotone.attacks.judging import Row, judge
from isotone.attacks.probe import Probe, probe_documents
from isotone.attacks.running import judged
from isotone.attacks.scoring import Target, frozen
from isotone.errors import Stopped, UsageError
from isotone.matching import clean_nll
from isotone.pairs import PairLayout
from isotone.records import JsonLines, tensors_from_file, tensors_to_bytes

from .test_all_attacks import ATTACKS, BUDGET, BUDGETED, FLIPS, ON_TEXT, SEARCHES, found
from .test_running import StopAfter

PAD, EOS = 0, 1
PROTOCOL = SourceProtocol(source=12, target=12, pad=PAD, eos=EOS, least=FLIPS)
LENGTHS = [(11, 11), (3, 1), (7, 4), (11, 2), (5, 9)]

every_attack = pytest.mark.parametrize("name", ATTACKS)


@pytest.fixture
def model() -> Any:
    return reactive_t5()


def reactive_t5(seed: int = 0, name: str = "t5") -> Any:
    """Return a random T5 with weights so large that single tokens of the source matter to the reference."""
    return tiny_model(name, seed=seed, initializer_factor=3.0)


def packed(source: list[int], target: list[int], columns: int = 12) -> np.ndarray:
    """Return a row as data are packed, with the EOS of both sides."""
    sides = [[*side, EOS] + [PAD] * (columns - 1 - len(side)) for side in (source, target)]
    return np.array(sides[0] + sides[1])


def windows(count: int = 5, seed: int = 0, lengths: list[tuple[int, int]] | None = None) -> list[Window]:
    rng = np.random.default_rng(seed)
    sides = [(lengths or LENGTHS)[i % len(lengths or LENGTHS)] for i in range(count)]
    rows = [packed(*(rng.integers(2, VOCABULARY, n).tolist() for n in both)) for both in sides]
    return PROTOCOL.cut([Window(f"pair-{i}", row) for i, row in enumerate(rows)])[0]


def vocabulary() -> Vocabulary:
    admissible_V = torch.ones(VOCABULARY, dtype=torch.bool)
    admissible_V[: EOS + 1] = False
    return Vocabulary(admissible_V)


def rows_of(attack: DocumentAttack, model: nn.Module, count: int = 5, **more: Any) -> list[Row]:
    return run_documents(attack, model, vocabulary(), windows(count), PROTOCOL, **more)


def problem_of(model: nn.Module) -> Problem:
    return Problem(Target(model, PROTOCOL.scored, pairs=PROTOCOL.pairs), PROTOCOL, vocabulary())


# --- every attack ---


@pytest.mark.parametrize("name", [*ON_TEXT, "published"])
def test_only_tokens_of_the_source_are_edited_never_its_end_padding_or_reference(
    name: str, model: PreTrainedModel
) -> None:
    rows = rows_of(ATTACKS[name][0], model)
    assert any(row["edits"] for row in rows)
    for row, window in zip(rows, windows(), strict=True):
        end = window.tokens.tolist().index(EOS)
        positions = [position for position, _, _ in row["edits"]]
        assert len(set(positions)) == len(positions) <= FLIPS
        assert all(position < end for position in positions)
        assert all(old == window.tokens[at] != new != PAD for at, old, new in row["edits"])


@every_attack
def test_a_pair_spends_what_one_that_fills_all_columns_spends(name: str, model: PreTrainedModel) -> None:
    attack, lengths = ATTACKS[name]
    spent = [row["spent_tokens"] for row in rows_of(attack, model)]
    assert max(spent) == lengths * PROTOCOL.length
    if name not in ("beam", "iterative", "shuffled"):  # a short source has fewer candidates at each position
        assert set(spent) == {lengths * PROTOCOL.length}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_never_exceeded(name: str, model: PreTrainedModel) -> None:
    attack = replace(ATTACKS[name][0], budget_tokens=BUDGET)  # type: ignore[type-var, call-arg]
    spent = [row["spent_tokens"] for row in rows_of(attack, model, count=2)]
    assert BUDGET / 2 < max(spent) <= BUDGET


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_handed_over_is_the_best_that_was_seen_and_the_judge_agrees(name: str, model: PreTrainedModel) -> None:
    rows = rows_of(ATTACKS[name][0], model)
    for row in rows:
        assert row["progress"][-1][1] == pytest.approx(sum(row["attacked_nll"]), abs=1e-3)
        assert row["delta_nats"] > -1e-4
    assert max(row["delta_nats"] for row in rows) > 0.1


@every_attack
def test_an_interrupted_state_goes_on_to_the_same_end(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    attack, path = ATTACKS[name][0], tmp_path / "state.safetensors"

    def finish(through_file: bool) -> State:
        state = attack.start(problem, windows(3))
        while not attack.is_done(state):
            state = attack.step(problem, state)
            if through_file:
                path.write_bytes(tensors_to_bytes(state))
                state = tensors_from_file(path)
        return state

    with frozen(model):
        problem = problem_of(model)
        plain, written = finish(False), finish(True)
    assert all(torch.equal(plain[key].nan_to_num(), written[key].nan_to_num()) for key in plain)


@every_attack
def test_batches_of_any_size_find_the_same(name: str, model: PreTrainedModel) -> None:
    attack = ATTACKS[name][0]
    assert found(rows_of(attack, model, batch_size=1)) == found(rows_of(attack, model, batch_size=16))


@every_attack
def test_columns_without_text_in_documents_attacked_together_are_not_computed(
    name: str, model: PreTrainedModel
) -> None:
    read: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: read.append((given["attention_mask"].shape[1], given["decoder_input_ids"].shape[1])),
        with_kwargs=True,
    )
    pairs = windows(4, lengths=[(5, 2), (3, 6), (4, 1), (6, 3)])
    rows = run_documents(ATTACKS[name][0], model, vocabulary(), pairs, PROTOCOL, batch_documents=2, batch_size=3)
    hook.remove()
    assert all(row["status"] == "ok" for row in rows)
    assert set(read) == {(6, 7), (7, 4)}  # the longest of each two, and EOS


@every_attack
def test_a_resume_by_document_gives_the_same_rows(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    rows = rows_of(ATTACKS[name][0], model, log=log, batch_documents=2)
    log.truncate(lambda row: row["index"] < 3)
    assert rows_of(ATTACKS[name][0], model, log=log, batch_documents=2) == rows == log.read()


@every_attack
def test_no_edit_changes_nothing_exactly(name: str, model: PreTrainedModel) -> None:
    attack = ATTACKS[name][0]
    with frozen(model):
        problem = problem_of(model)
        for row in judged(attack, problem, windows(3), attack.start(problem, windows(3))):
            assert row.get("edits", []) == []
            assert row["clean_nll"] == row["attacked_nll"]
            assert row.get("delta_nats", 0) == 0


@every_attack
def test_a_model_that_returns_nan_leaves_every_document_missing(name: str, model: Any) -> None:
    with torch.no_grad():
        model.decoder.final_layer_norm.weight[0] = torch.nan
    for row in rows_of(ATTACKS[name][0], model):
        assert row["status"] == "missing"
        assert "not a finite number" in row["reason"]


def test_edits_are_replayed_on_another_model_as_it_judges_its_own(model: PreTrainedModel) -> None:
    rows, other = rows_of(ATTACKS["iterative"][0], model), reactive_t5(1, "t5_gated")
    edits = {row["id"]: row["edits"] for row in rows}
    again = replay(model, vocabulary(), windows(), edits, PROTOCOL)
    assert [row["delta_nats"] for row in again] == [row["delta_nats"] for row in rows]
    elsewhere = replay(other, vocabulary(), windows(), edits, PROTOCOL)
    assert [row["edits"] for row in elsewhere] == [row["edits"] for row in rows]
    assert [row["delta_nats"] for row in elsewhere] != [row["delta_nats"] for row in rows]


def test_the_probe_asks_about_the_source_only(model: PreTrainedModel) -> None:
    asked = probe_documents(Probe(edits=20, candidates=4), model, vocabulary(), windows(3), PROTOCOL)
    for row, (num_source, _) in zip(asked, LENGTHS, strict=False):
        assert row["position"] < num_source
        assert row["spent_tokens"] == (3 + 20 + VOCABULARY - 2) * PROTOCOL.length
        assert len(row["first_order"]) == len(row["true"]) == 20
        assert row["oracle"]["oracle"] >= row["oracle"]["gradient"]


# --- the judge ---


class Copying(nn.Module):
    """p(y_t | x_t) is a row of a table: tokens are translated one by one; the embedding is the identity."""

    def __init__(self, probabilities_VV: torch.Tensor):
        super().__init__()
        self.log_VV = nn.Parameter(probabilities_VV.log())
        self.embedding = nn.Embedding.from_pretrained(torch.eye(len(probabilities_VV)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **unused: object,
    ) -> SimpleNamespace:
        logits_BSV = self.log_VV[input_ids] if inputs_embeds is None else inputs_embeds @ self.log_VV
        return SimpleNamespace(logits=logits_BSV[:, : decoder_input_ids.shape[1]])


SMALL = SourceProtocol(source=4, target=3, pad=PAD, eos=EOS)
PAIR = Window("a", np.array([2, 3, EOS, PAD, 3, EOS, PAD]))
"""The source 2 3, the reference 3: p(3|2) and then p(EOS|3) count."""


@pytest.fixture
def copying() -> Copying:
    even = [0.25] * 4
    return Copying(torch.tensor([even, even, [0.1, 0.1, 0.3, 0.5], [0.2, 0.6, 0.1, 0.1]]))


def small_row(model: nn.Module, attacked: list[int], vocabulary: Vocabulary | None = None) -> Row:
    problem = Problem(Target(model, SMALL.scored, pairs=SMALL.pairs), SMALL, vocabulary or Vocabulary.all_ids(4))
    with frozen(model):
        return judge(problem, [PAIR], torch.tensor([attacked]))[0]


def test_reference_loss_and_published_accounting_are_those_computed_by_hand(copying: Copying) -> None:
    row = small_row(copying, [3, 3, EOS, PAD, 3, EOS, PAD])
    assert row["edits"] == [[0, 2, 3]]
    assert row["clean_nll"] == pytest.approx([-math.log(0.5), -math.log(0.6)])
    assert row["attacked_nll"] == pytest.approx([-math.log(0.1), -math.log(0.6)])
    assert row["context_clean_nll"] == row["context_attacked_nll"] == []
    assert row["scored_tokens"] == 2
    assert row["delta_nats"] == pytest.approx(math.log(5))
    assert row["delta_by_offset"] == {"0-7": {"nats": pytest.approx(math.log(5)), "tokens": 2}}
    assert row["top1"] == {"clean": 2, "attacked": 1}
    accounting = row["published_accounting"]
    assert accounting["clean"] == pytest.approx(-math.log(0.3) / 2)
    assert accounting["degradation"] == pytest.approx(math.log(5) / -math.log(0.3))
    assert accounting["flipped"] == 0  # no label is edited
    assert accounting["untouched"] == pytest.approx(math.log(5) / 2)


@pytest.mark.parametrize("at", [4, 5])
def test_an_edit_of_the_reference_is_refused(copying: Copying, at: int) -> None:
    attacked = PAIR.tokens.tolist()
    attacked[at] = 2
    with pytest.raises(ValueError, match="outside of the attackable positions"):
        small_row(copying, attacked)


class Splitting:
    """A tokenizer in which the text of a 2 is read as 3 2 2, and everything else as itself."""

    def decode(self, ids: list[int], **unused: object) -> str:
        return "".join(map(str, ids)).replace("2", "322")

    def __call__(self, text: str, **unused: object) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}


def test_a_source_that_does_not_survive_is_scored_as_what_it_becomes_however_long(copying: Copying) -> None:
    vocabulary = Vocabulary(torch.ones(4, dtype=torch.bool), Splitting())
    survives = small_row(copying, [3, 3, EOS, PAD, 3, EOS, PAD], vocabulary)
    assert (survives["round_trip"], survives["text_space"]) == (True, None)  # end and padding are no text
    changed = small_row(copying, [2, 2, EOS, PAD, 3, EOS, PAD], vocabulary)  # read as 3 2 2 3 2 2: wider than a row
    assert changed["round_trip"] is False
    assert changed["text_space"] == {"delta_nats": pytest.approx(math.log(0.5 / 0.1) + math.log(0.6 / 0.1), rel=1e-5)}


def test_the_mean_clean_loss_counts_the_tokens_of_references_alone(copying: Copying) -> None:
    ids_BL = torch.from_numpy(np.stack([PAIR.tokens, [3, EOS, PAD, PAD, EOS, PAD, PAD]]))
    expected = -(math.log(0.5) + 2 * math.log(0.6)) / 3
    assert clean_nll(copying, ids_BL, SMALL.scored, 8, SMALL.pairs) == pytest.approx(expected)


# --- rows ---


def test_pairs_without_enough_source_or_with_an_empty_target_are_left_out_and_said_why() -> None:
    pairs = [
        Window(name, packed(*sides))
        for name, sides in {"a": ([5, 6], [7]), "b": ([5] * 4, []), "c": ([5] * 3, [7])}.items()
    ]
    found, num_refused = PROTOCOL.cut(pairs)
    assert [window.id for window in found] == ["c"]
    assert num_refused == 2
    assert [PROTOCOL.refusal(pair.tokens) for pair in pairs] == [
        "its source has 2 of the 3 tokens that attacks.hotflip.flips asks for",
        "its target is empty",
        "",
    ]


def test_a_long_source_is_cut_before_its_end_and_a_long_target_is_not_said_to_end() -> None:
    protocol = SourceProtocol(source=4, target=2, pad=PAD, eos=EOS, packed=12)
    row = packed([2, 3, 4, 5, 6], [7, 8, 9])
    [window], _ = protocol.cut([Window("a", row)])
    assert window.tokens.tolist() == [2, 3, 4, EOS, 7, 8]
    assert protocol.is_cut(row)
    [window], _ = protocol.cut([Window("b", packed([2, 3], [7]))])
    assert window.tokens.tolist() == [2, 3, EOS, PAD, 7, EOS]
    assert not protocol.is_cut(packed([2, 3], [7]))


@pytest.mark.parametrize("wrong", [{"source": 1}, {"target": 0}, {"least": 0}, {"eos": PAD}])
def test_impossible_protocols_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="an EOS that is no padding"):
        replace(PROTOCOL, **wrong)


# --- triggers ---

TRIGGERS = UniversalTriggers(length=4, candidates=10, iterations=4, restarts=2, batch_documents=3, seed=1)

either = pytest.mark.parametrize("proposals", ["gradient", "surrogate"])


@either
def test_a_trigger_is_found_before_sources_and_a_resumed_search_is_the_same(
    proposals: Any, model: PreTrainedModel, tmp_path: Path
) -> None:
    attack = replace(TRIGGERS, proposals=proposals)
    search = windows(6, seed=1)
    whole = search_trigger(attack, model, vocabulary(), search, PROTOCOL)
    assert all(restart["search_nll"] > restart["initial_search_nll"] for restart in whole["finished"])
    standing = 3 if proposals == "gradient" else 1
    assert whole["spent_tokens"] == 2 * PROTOCOL.length * (2 * 6 + 4 * 3 * (standing + 10))
    state = tmp_path / "state.json"
    for _ in range(3):
        with pytest.raises(Stopped):
            search_trigger(attack, model, vocabulary(), search, PROTOCOL, state_path=state, stop=StopAfter(2))
    assert search_trigger(attack, model, vocabulary(), search, PROTOCOL, state_path=state) == whole


def test_a_trigger_removes_nothing_of_a_source_and_controls_stand_in_its_place(model: PreTrainedModel) -> None:
    model.double()  # in fp32 rounding alone moves the losses of so large weights by thousandths of a nat
    held_out = windows(4, seed=2)
    found = search_trigger(TRIGGERS, model, vocabulary(), windows(6, seed=1), PROTOCOL)
    rows = evaluate_trigger(TRIGGERS, found, model, vocabulary(), held_out, PROTOCOL, batch_documents=2)
    trigger = found["finished"][found["best"]]["trigger_ids"]
    for row, window in zip(rows, held_out, strict=True):
        source = PROTOCOL.text(window.tokens.tolist())[: 12 - 4 - 1]
        target = [token for token in window.tokens[12:].tolist() if token != PAD]
        losses = []
        for read in (source, trigger + source):
            logits_TV = model(input_ids=torch.tensor([[*read, EOS]]), labels=torch.tensor([target])).logits[0]
            losses.append(-logits_TV.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0])
        assert row["clean_nll"] == pytest.approx(losses[0].tolist(), abs=2e-5)  # losses are taken from logits in fp32
        assert row["attacked_nll"] == pytest.approx(losses[1].tolist(), abs=2e-5)
        assert row["delta_nats"] == pytest.approx((losses[1] - losses[0]).sum().item(), abs=2e-4)
        assert row["scored_tokens"] == len(target)
        assert row["published_accounting"]["clean"] == pytest.approx(losses[0].mean().item(), abs=2e-5)
        assert len(row["shift_deltas"]) == len(row["random_deltas"]) == 8


def test_snippets_are_of_other_sources_that_are_long_enough(model: PreTrainedModel) -> None:
    held_out = windows(3, seed=2, lengths=[(11, 5), (11, 5), (3, 5)])
    held_out[1].tokens[:11] = 9
    found = search_trigger(TRIGGERS, model, vocabulary(), windows(6, seed=1), PROTOCOL)
    row = evaluate_trigger(TRIGGERS, found, model, vocabulary(), held_out, PROTOCOL)[0]
    assert len(set(row["shift_deltas"])) == 1  # eight times 9 9 9 9: the third source has only 3 tokens
    text = [9, 9, 9, 9, *held_out[0].tokens[:7], EOS]
    plain = [*held_out[0].tokens[:7], EOS, *[PAD] * 4]
    rows_BL = torch.tensor(np.array([[*read, *held_out[0].tokens[12:]] for read in (text, plain)]))
    with frozen(model):
        nats_B = Target(model, PROTOCOL.scored, pairs=PairLayout(12, PAD)).nats(rows_BL)
    assert row["shift_deltas"][0] * row["scored_tokens"] == pytest.approx(float(nats_B[0] - nats_B[1]), rel=1e-4)


def test_a_trigger_that_leaves_no_source_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"11 tokens leave nothing of a source in the 12 columns"):
        search_trigger(replace(TRIGGERS, length=11), model, vocabulary(), windows(), PROTOCOL)


# --- a tokenizer as T5's ---


@pytest.fixture(scope="module")
def unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer with ▁ before words and EOS after a text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in ("the", "cat", "dog", "sat", "on", "a", "mat")]
    pieces += [(piece, -4.0) for piece in ("s", "ting", "ed", ".", ",")]
    pieces += [("<extra_id_0>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<extra_id_0>"], **special)


def ids_of(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> list[int]:
    return [tokenizer.get_vocab()[piece] for piece in pieces]


def test_tokens_that_begin_a_word_are_admissible_and_no_special_ones(unigram: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(unigram, 32)
    words = ids_of(unigram, [f"▁{word}" for word in ("the", "cat", "dog", "sat", "on", "a", "mat")])
    assert set(words) <= set(vocabulary.ids_N.tolist())
    specials = ids_of(unigram, ["<pad>", "</s>", "<unk>", "<extra_id_0>", "s", "ting"])
    assert not vocabulary.admissible_V[specials].any()  # "s" alone is read as ▁ s
    assert not vocabulary.admissible_V[len(unigram) :].any()


def test_sources_survive_their_text_without_end_and_padding(unigram: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary.from_tokenizer(unigram, 32)
    protocol = SourceProtocol(source=8, target=4, pad=PAD, eos=EOS)
    ids = unigram("the cat sat on a mat")["input_ids"]
    assert ids[-1] == EOS
    row = [*ids, PAD, *ids[:4]]
    assert vocabulary.through_text(protocol.text(row)) == ids[:-1]
    dogs = unigram("the dogs sat", add_special_tokens=False)["input_ids"]
    assert vocabulary.through_text(dogs) == dogs
    ending = ids_of(unigram, ["ting", "▁cat"])  # the first word of a text begins with ▁
    assert vocabulary.through_text(ending) == ids_of(unigram, ["▁", "ting", "▁cat"])
