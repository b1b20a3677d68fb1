"""What is measured beside a certificate: the premise of order, and order at the model's end."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MODELS, tiny_model, tokens
from typer.testing import CliRunner

from isotone.cli import app
from isotone.constraint import constrain, fold, premise
from isotone.constraint.premise import measure_order, premise_met
from isotone.models import load_tokenizer, save_model
from isotone.pairs import PairLayout

TEXTS = [np.asarray(row) for row in tokens(5, length=20).numpy()]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_measured_unchanged_and_the_same_twice(name: str) -> None:
    model = tiny_model(name)
    state = copy.deepcopy(model.state_dict())
    found = measure_order(model, TEXTS)
    assert found == measure_order(model, TEXTS)
    assert json.loads(json.dumps(found)) == found
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert found["premise"]["pairs"] > 0
    assert set(found["probes"]) == {"insert", "repeat", "raise"}
    assert found["kind"] == "measured, not proved"


def test_layer_norm_never_meets_the_premise() -> None:
    """Theorem 2: no two different outputs of a LayerNorm with positive gains are ordered."""
    assert measure_order(tiny_model("gpt_neox"), TEXTS)["premise"]["ordered"] == 0


def test_ordered_inputs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = iter([[torch.zeros(3, 2)], [torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, -1.0]])]])
    monkeypatch.setattr(premise, "_inputs", lambda *_: next(inputs))
    text_L = torch.from_numpy(TEXTS[0])
    assert premise_met(tiny_model("gpt2"), [text_L], [text_L]) == {"pairs": 2, "ordered": 1, "rate": 0.5}


def test_texts_that_were_not_edited_give_no_pair() -> None:
    text_L = torch.from_numpy(TEXTS[0])
    assert premise_met(tiny_model("gpt2"), [text_L], [text_L]) == {"pairs": 0, "ordered": 0, "rate": None}


def test_an_edit_of_a_text_reaches_what_comes_after_it_alone() -> None:
    """Each network of a causal model reads something else from the edited token on, and the same before it."""
    model = tiny_model("llama")
    text_L = torch.from_numpy(TEXTS[0])
    edited_L = text_L.clone()
    edited_L[12] = (edited_L[12] + 1) % model.config.vocab_size
    found = premise_met(model, [text_L], [edited_L])
    assert found["pairs"] == model.config.num_hidden_layers * (len(text_L) - 12)


def test_padding_of_pairs_is_no_pair_of_inputs() -> None:
    """An edited source changes all that the encoder says and all that the decoder reads, but for its first states."""
    model = tiny_model("t5")
    layout = PairLayout(source=9, pad=0)
    row_L = torch.tensor([5, 6, 7, 1, 0, 0, 0, 0, 0, 8, 9, 1, 0, 0])
    edited_L = row_L.clone()
    edited_L[1] = 11
    found = premise_met(model, [row_L], [edited_L], layout)
    assert found["pairs"] == model.config.num_layers * 4 + model.config.num_decoder_layers * 3


def test_a_monotone_output_is_seen_and_the_control_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is made the sum of what is read: raising raises it, and so far the probe must say."""
    monkeypatch.setattr(premise, "_last_logits", lambda model, e_LD: e_LD.sum(0).repeat(4))
    found = measure_order(tiny_model("gpt2"), TEXTS)["probes"]
    assert found["raise"]["monotone"] == 1.0
    assert found["insert"]["monotone"] == 1.0
    assert found["insert"]["control"] < 0.5


def test_no_dose_of_the_control_contains_another() -> None:
    embed = torch.nn.Embedding(1000, 1)
    with torch.no_grad():
        embed.weight.copy_(torch.arange(1000.0)[:, None])
    ids_L = torch.arange(10)
    doses = [
        {int(token) for token in e_LD} - set(range(10))
        for e_LD in premise._insert_others(embed, ids_L, torch.Generator().manual_seed(0))
    ]
    assert [len(dose) for dose in doses] == [0, 1, 2, 3, 4]
    assert not any(low & high for low, high in itertools.combinations(doses, 2))
    copies = [len(e_LD) for e_LD in premise._insert_copies(embed, ids_L, torch.Generator().manual_seed(0))]
    assert copies == [10, 11, 12, 13, 14]


def test_of_an_encoder_decoder_only_the_source_is_edited() -> None:
    """The decoder reads its start token: one position, and the same whatever the text is."""
    model = tiny_model("t5")
    read: list[torch.Tensor] = []
    model.decoder.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
    model.encoder.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
    inputs = premise._inputs(model, premise._asked(model, torch.from_numpy(TEXTS[0])[None], None))
    assert sorted(tuple(ids.shape) for ids in read) == [(1, 1), (1, 20)]
    assert [len(u_Td) for u_Td in inputs] == [20, 20, 1, 1]


def test_texts_that_are_too_short_are_left_out() -> None:
    found = measure_order(tiny_model("gpt2"), [TEXTS[0], TEXTS[0][:7]])
    assert found["documents"] == 1


def test_the_command_prints_the_keys_of_the_contract_and_exits_with_3_when_violated(tmp_path: Path) -> None:
    model = tiny_model("arcee", vocab_size=4096)
    constrain(model, "mlp_both", "projection", "absolute")
    tokenizer = load_tokenizer("pocket")
    save_model(fold(model), tokenizer, tmp_path / "strict")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = -1e-9
    save_model(model, tokenizer, tmp_path / "violated")
    (tmp_path / "texts.txt").write_text("In the beginning God created the heavens and the earth, and it was good.\n")

    def certify(*words: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["certify", *words])
        return found.exit_code, found.stdout

    code, printed = certify(str(tmp_path / "strict"), "--json")
    found = json.loads(printed)
    assert (code, found["verdict"], found["fields"]["domain"]) == (0, "strict", "ℝ^d")
    assert set(found) == {"verdict", "fields", "reasons", "weights_hash"}
    assert set(found["fields"]) == {"scope", "map", "domain", "weights", "activation", "order"}
    code, printed = certify(str(tmp_path / "violated"), "--json")
    assert (code, json.loads(printed)["verdict"]) == (3, "violated")
    code, printed = certify(str(tmp_path / "strict"), "--probe", str(tmp_path / "texts.txt"))
    assert code == 0
    assert printed.count("measured, not proved") == 4


def test_a_context_without_room_for_the_doses_takes_shorter_texts() -> None:
    """A text of 64 tokens and 4 inserted ones are more than a GPT-2 of 64 positions can read."""
    assert measure_order(tiny_model("gpt2"), [tokens(1, 64)[0].numpy()])["documents"] == 1
