"""What is measured beside a certificate: the premise of order, and order at the model's end."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MODELS, tiny_model, tokens
from typer.testing import CliRunner

from isotone.cli import app
from isotone.constraint import constrain, fold, premise
from isotone.constraint.premise import measure_order
from isotone.models import load_tokenizer, save_model

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
    assert premise._premise(tiny_model("gpt2"), torch.from_numpy(TEXTS[0]), torch.Generator()) == (2, 1)


def test_a_monotone_output_is_seen_and_the_control_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is made the sum of what is read: raising raises it, and so far the probe must say."""
    monkeypatch.setattr(premise, "_last_logits", lambda model, e_LD: e_LD.sum(0).repeat(4))
    found = measure_order(tiny_model("gpt2"), TEXTS)["probes"]
    assert found["raise"]["monotone"] == 1.0
    assert found["insert"]["monotone"] == 1.0
    assert found["insert"]["control"] < 0.5


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
