"""The loss of pairs is that of every target token given the source; ROUGE is rouge-score's own; both resume."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_pairs import EOS, PAD, pair_tokenizer

from isotone import records
from isotone.config import Rouge
from isotone.data.packed import PackedDocument
from isotone.errors import Stopped
from isotone.evaluation import summarize
from isotone.evaluation.pairs import evaluate_pairs
from isotone.evaluation.rouge import rouge, summarize_rouge, write_targets
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout

S, T = 10, 6
LAYOUT = PairLayout(S, PAD)
GREEDY = Rouge(beams=1, no_repeat_ngram=0, batch_size=2)


def documents(count: int = 5) -> list[PackedDocument]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        row = np.full(S + T, PAD, np.int64)
        for first, length in ((0, S), (S, T)):
            size = rng.integers(2, length)
            row[first : first + size] = [*rng.integers(4, 64, size - 1), EOS]
        made.append(PackedDocument(f"d{i}", row, 20 + i, "a source", "a target"))
    return made


def log(tmp_path: Path) -> records.JsonLines:
    return records.JsonLines(tmp_path / "work.jsonl")


def test_every_target_token_is_scored_once_given_the_source(tmp_path: Path) -> None:
    model = tiny_model("t5")
    rows = evaluate_pairs(model, documents(), LAYOUT, batch_size=2, work=log(tmp_path), identity={})
    for row, document in zip(rows, documents(), strict=True):
        sides = [side[side != PAD][None] for side in torch.from_numpy(document.tokens).split([S, T])]
        with torch.no_grad():
            mean = model(input_ids=sides[0], labels=sides[1]).loss
        assert row["id"] == document.id
        assert row["num_tokens"] == sides[1].numel()
        assert row["nats"] == pytest.approx(float(mean) * sides[1].numel(), abs=1e-4)
    summary = summarize(rows)
    nats, tokens = sum(r["nats"] for r in rows), sum(r["num_tokens"] for r in rows)
    assert summary["perplexity"]["value"] == pytest.approx(np.exp(nats / tokens))
    assert summary["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / sum(range(20, 25)))


class StopAfter(StopFlag):
    def __init__(self, batches: int):
        super().__init__()
        self.left = batches

    def check(self, where: str) -> None:
        if self.left == 0:
            raise Stopped(where)
        self.left -= 1


def test_interrupted_evaluations_and_searches_equal_uninterrupted_ones(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("t5"), pair_tokenizer()

    def both(folder: Path, stop: StopFlag | None) -> Any:
        folder.mkdir(exist_ok=True)
        losses = records.JsonLines(folder / "losses.jsonl")
        found = evaluate_pairs(model, documents(), LAYOUT, batch_size=2, work=losses, identity={"w": "1"}, stop=stop)
        texts = records.JsonLines(folder / "texts.jsonl")
        return found, write_targets(
            model, tokenizer, documents(), LAYOUT, GREEDY, work=texts, identity={"w": "1"}, stop=stop
        )

    whole = both(tmp_path / "whole", None)
    for _ in range(5):
        with pytest.raises(Stopped):
            both(tmp_path / "parts", StopAfter(1))
    assert both(tmp_path / "parts", None) == whole


def test_texts_of_another_model_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = pair_tokenizer()
    for seed in (0, 1):
        write_targets(
            tiny_model("t5", seed=seed),
            tokenizer,
            documents(),
            LAYOUT,
            GREEDY,
            work=log(tmp_path),
            identity={"weights": str(seed)},
        )
    assert "set aside" in caplog.text


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_greedy_search_writes_the_most_likely_tokens(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(name), pair_tokenizer()
    texts = write_targets(model, tokenizer, documents(), LAYOUT, GREEDY, work=log(tmp_path), identity={})
    for text, document in zip(texts, documents(), strict=True):
        source = torch.from_numpy(document.tokens[:S])
        written = [PAD]
        while len(written) <= T and written[-1] != EOS:
            with torch.no_grad():
                logits = model(input_ids=source[source != PAD][None], decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
        assert text == str(tokenizer.decode(written, skip_special_tokens=True)).strip()


def test_a_models_own_settings_of_generation_have_no_say_and_stay_as_they_were(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("t5"), pair_tokenizer()
    settings = Rouge(beams=2, no_repeat_ngram=0)
    plain = write_targets(model, tokenizer, documents(), LAYOUT, settings, work=log(tmp_path), identity={"own": "no"})
    own = model.generation_config
    own.repetition_penalty, own.min_length, own.suppress_tokens = 5.0, 5, list(range(4, 40))
    own.early_stopping, own.forced_eos_token_id = True, EOS
    before = own.to_dict()
    again = write_targets(model, tokenizer, documents(), LAYOUT, settings, work=log(tmp_path), identity={"own": "yes"})
    assert again == plain
    assert model.generation_config is own
    assert own.to_dict() == before


def test_beams_never_repeat_an_ngram_and_keep_to_the_length(tmp_path: Path) -> None:
    settings = Rouge(beams=3, no_repeat_ngram=2, max_tokens=9)
    texts = write_targets(
        tiny_model("t5"), pair_tokenizer(), documents(), LAYOUT, settings, work=log(tmp_path), identity={}
    )
    for text in texts:
        words = text.split()
        pairs = list(pairwise(words))
        assert len(pairs) == len(set(pairs))
        assert len(words) <= 9


def test_rouge_counts_ngrams_by_hand() -> None:
    """Unigrams 3 of 4 and 3 of 6; bigrams 1 of 3 and 1 of 5; stems agree."""
    found = rouge("the cats sat down", "the cat sat on the mat")
    assert found["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    precision, recall = 2 / 3, 2 / 5
    assert found["rouge2"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert rouge("same words here", "same words here") == {"rouge1": 1.0, "rouge2": 1.0, "rougeLsum": 1.0}
    assert rouge("", "something") == {"rouge1": 0.0, "rouge2": 0.0, "rougeLsum": 0.0}


def test_rouge_lsum_takes_sentences_one_by_one() -> None:
    """Two sentences in the other order: as one line half of the words are in order, as sentences all are."""
    swapped = rouge("He went home. She stayed there.", "She stayed there. He went home.")
    assert swapped["rougeLsum"] == 1.0
    assert rouge("he went home she stayed there", "she stayed there he went home")["rougeLsum"] == 0.5


def test_intervals_come_from_resampled_documents_and_do_not_change() -> None:
    rng = np.random.default_rng(1)
    rows = [{"rouge1": x, "rouge2": x / 2, "rougeLsum": 0.25} for x in rng.uniform(0, 1, 40)]
    found = summarize_rouge(rows, 1000)
    mean, error = np.mean([r["rouge1"] for r in rows]), np.std([r["rouge1"] for r in rows]) / 40**0.5
    assert found["rouge1"]["value"] == pytest.approx(mean)
    low, high = found["rouge1"]["ci95"]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    assert found["rouge2"]["ci95"] == pytest.approx([low / 2, high / 2])
    assert found["rougeLsum"]["ci95"] == [0.25, 0.25]
    assert summarize_rouge(rows, 1000) == found
