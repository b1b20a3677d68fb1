"""What an arm starts from."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import logits, tiny_model

from isotone.constraint.feed_forward import feed_forwards
from isotone.constraint.replacement import replace_activation
from isotone.pipeline import arms


def test_a_random_start_has_the_activations_of_the_pretrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers has no name for them, or where they are not the same in all blocks."""
    model = tiny_model("gpt_neox")
    replace_activation(model, "monotone_gelu", (1,))
    monkeypatch.setattr(arms, "load_pretrained", lambda context: model)
    first, again, other = (arms.load_random(cast(Any, SimpleNamespace(seed=seed, device="cpu"))) for seed in (1, 1, 2))
    kinds = [type(network.activation) for network in feed_forwards(model)]
    assert [type(network.activation) for network in feed_forwards(first)] == kinds
    assert first.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
