"""Batches, caches and memory errors change what a loss costs, never what it is."""

from typing import Any

import pytest
import torch
from tiny_models import MODELS
from transformers import PreTrainedModel

from isotone.attacks import Window
from isotone.attacks.scoring import Target, frozen

from .conftest import PROTOCOL, Bigram, make_windows, reactive_model


def ids(windows: list[Window]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(window.tokens) for window in windows])


class LimitedMemory:
    """Makes a model fail as a device does when a batch is larger than what fits."""

    def __init__(self, model: torch.nn.Module, num_sequences: int):
        self.failures = 0
        self.num_sequences = num_sequences
        model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"]
        if len(inputs) > self.num_sequences:
            self.failures += 1
            raise torch.OutOfMemoryError("too large")


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("t5")])  # pairs have no prefix cache
def test_prefix_cached_losses_equal_uncached_ones(name: str) -> None:
    model, ids_BL = reactive_model(name), ids(make_windows(3))
    sequences_N = torch.tensor([0, 2, 1, 0, 2, 2, 1])
    positions_N = torch.tensor([9, 1, 4, 7, 9, 3, 1])
    tokens_N = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    with frozen(model):
        target = Target(model, PROTOCOL.scored, batch_size=3)
        gradient = target.gradient(ids_BL, keep_cache=True)
        assert gradient.layers is not None
        before = [(keys.clone(), values.clone()) for keys, values in gradient.layers]
        cached_N = target.candidates(ids_BL, gradient.layers, sequences_N, positions_N, tokens_N)
        edited_NL = ids_BL[sequences_N]
        edited_NL[torch.arange(7), positions_N] = tokens_N
        torch.testing.assert_close(cached_N, target.nats(edited_NL), atol=1e-5 * PROTOCOL.continuation, rtol=1e-6)
    for (keys, values), (keys_before, values_before) in zip(gradient.layers, before, strict=True):
        assert torch.equal(keys, keys_before)
        assert torch.equal(values, values_before)


def test_a_forward_pass_alone_gives_the_same_cache(model: PreTrainedModel) -> None:
    ids_BL, one = ids(make_windows(3)), torch.tensor([1])
    with frozen(model):
        target = Target(model, PROTOCOL.scored, batch_size=2)
        gradient, (nats_B, layers) = target.gradient(ids_BL, keep_cache=True), target.read(ids_BL)
        torch.testing.assert_close(nats_B, gradient.nats_B, atol=1e-5 * PROTOCOL.continuation, rtol=1e-6)
        by_both = [target.candidates(ids_BL, found, one, 4 * one, 7 * one) for found in (gradient.layers, layers)]
    assert layers is not None
    torch.testing.assert_close(*by_both, atol=1e-5 * PROTOCOL.continuation, rtol=1e-6)


def test_no_perturbation_changes_nothing_exactly_and_one_changes_what_is_read(model: PreTrainedModel) -> None:
    ids_BL = ids(make_windows(3))
    none_BLD = torch.zeros(*ids_BL.shape, 16)
    some_BLD = none_BLD.clone()
    some_BLD[:, 3, 0] = 0.5  # of one dimension: a norm takes a shift of all away again
    with frozen(model):
        target = Target(model, PROTOCOL.scored)
        clean, same = target.score_perturbed(ids_BL, none_BLD)
        _, moved = target.score_perturbed(ids_BL, some_BLD)
        torch.testing.assert_close(clean.nll_BT, target.scores(ids_BL).nll_BT)
        gradient = target.gradient(ids_BL, perturbation_BLD=some_BLD)
    assert torch.equal(clean.nll_BT, same.nll_BT)
    torch.testing.assert_close(gradient.nats_B, moved.nll_BT[:, PROTOCOL.scored.start - 1 :].double().sum(dim=1))
    assert not torch.allclose(clean.nll_BT, moved.nll_BT)


def test_a_model_without_a_cache_is_scored_without_one(bigram: Bigram) -> None:
    ids_BL = ids(make_windows(2)) % 3
    with frozen(bigram):
        target = Target(bigram, PROTOCOL.scored)
        gradient = target.gradient(ids_BL, keep_cache=True)
        assert gradient.layers is None
        one = torch.tensor([1])
        edited_BL = ids_BL[1:].clone()
        edited_BL[0, 1] = 2
        assert torch.equal(target.candidates(ids_BL, None, one, one, torch.tensor([2])), target.nats(edited_BL))


def test_gradient_equals_finite_differences(model: PreTrainedModel, windows: list[Window]) -> None:
    model, ids_BL = model.double(), ids(windows[:2])
    with frozen(model):
        gradient = Target(model, PROTOCOL.scored).gradient(ids_BL)
        weight_VD: torch.Tensor = model.get_parameter("gpt_neox.embed_in.weight")
        token, step = int(ids_BL[0, 4]), 1e-3
        assert (ids_BL[0] == token).sum() == 1
        nats = []
        for sign in (1, -1):
            weight_VD[token, 5] += sign * step
            nats.append(Target(model, PROTOCOL.scored).nats(ids_BL[:1])[0])
            weight_VD[token, 5] -= sign * step
    assert float(nats[0] - nats[1]) / (2 * step) == pytest.approx(float(gradient.grad_BLD[0, 4, 5]), rel=1e-2)


def test_a_batch_that_does_not_fit_is_halved_and_what_was_done_is_kept(model: PreTrainedModel) -> None:
    ids_BL = ids(make_windows(11))
    with frozen(model):
        expected = Target(model, PROTOCOL.scored, batch_size=8).nats(ids_BL)
        memory = LimitedMemory(model, num_sequences=3)
        target = Target(model, PROTOCOL.scored, batch_size=8)
        torch.testing.assert_close(target.nats(ids_BL), expected)
        torch.testing.assert_close(target.gradient(ids_BL).nats_B, expected)
    assert memory.failures == 2  # 8 → 4 → 2, and never again
    assert target.batch_size == 2


def test_one_sequence_that_does_not_fit_is_an_error(model: PreTrainedModel) -> None:
    LimitedMemory(model, num_sequences=0)
    with frozen(model), pytest.raises(torch.OutOfMemoryError):
        Target(model, PROTOCOL.scored).nats(ids(make_windows(2)))


def test_a_frozen_model_gets_its_state_back(model: PreTrainedModel) -> None:
    model.train()
    model.get_output_embeddings().weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
