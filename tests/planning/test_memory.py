"""Memory is counted as torch keeps it: of a block's activations, and never less for more rows, tokens or masters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS
from torch.autograd.graph import saved_tensors_hooks

from isotone.config_io import load_experiment
from isotone.evaluation.windows import fixed_batches
from isotone.pipeline.graph import Node
from isotone.planning.corpus import CorpusSize
from isotone.planning.memory import Machine, host_memory, layer_bytes, training_memory
from isotone.planning.shape import read_shape, shape_of
from isotone.planning.sizes import Sizes
from isotone.scoring import token_nll

ROWS, LENGTH = 2, 48


def _kept(name: str, layers: int, low: bool, frozen: bool) -> tuple[float, Any]:
    """Return the bytes that autograd keeps of a model, weights and their casts left out, and its configuration."""
    config_class, model_class, arguments = MODELS[name]
    if name == "gpt2":
        width = {"n_embd": 128, "n_head": 4, "n_layer": layers, "n_positions": LENGTH}
    else:
        width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": layers}
    kept_arguments = {key: value for key, value in arguments.items() if key not in ("head_dim", "resid_pdrop")}
    config = config_class(vocab_size=64, use_cache=False, **(kept_arguments | width))
    model = model_class(config).train(not frozen).requires_grad_(not frozen)
    sizes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = low and tuple(sorted(tensor.shape)) in sizes and tensor.dtype == torch.bfloat16
        if storage.data_ptr() not in owned and not (cast and storage.nbytes() == 2 * tensor.numel()):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids_BL = torch.randint(64, (ROWS, LENGTH))
    embeds_BLD = model.get_input_embeddings()(ids_BL).detach().requires_grad_(True) if frozen else None
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=low):
        token_nll(model, ids_BL, inputs_embeds_BLD=embeds_BLD)
    return sum(size for size, _ in kept.values()), config


@pytest.mark.parametrize(("low", "frozen"), [(False, False), (True, False), (False, True)])  # attacks are in fp32
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen2"])
def test_activations_of_a_block_are_those_that_autograd_keeps(name: str, low: bool, frozen: bool) -> None:
    (two, config), (four, _) = _kept(name, 2, low, frozen), _kept(name, 4, low, frozen)
    expected = layer_bytes(shape_of(name, config.to_dict(), "test"), LENGTH, low, frozen=frozen)
    assert expected == pytest.approx((four - two) / 2 / (ROWS * LENGTH), rel=0.15)


def _training(
    micro_batch: int,
    length: int,
    arm: str,
    checkpointing: bool = False,
    devices: int = 1,
    overrides: Sequence[str] = (),
) -> float:
    experiment = load_experiment(
        "smollm2-135m",
        [
            f"training.micro_batch={micro_batch}",
            f"data.sequence_length={length}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
            *overrides,
        ],
    )
    corpus = CorpusSize(1e9, 4e9, {split: np.full(10, 1000) for split in ("validation", "test")}, "test")
    sizes = Sizes(experiment, read_shape(experiment.model), corpus)
    return training_memory(sizes, Machine("cuda", "bf16", "sdpa", 0, devices), arm, copies=False)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 64), st.integers(8, 2048), st.integers(1, 64), st.integers(0, 1024))
def test_more_rows_or_longer_ones_never_take_less(rows: int, length: int, more_rows: int, longer: int) -> None:
    assert _training(rows, length, "baseline") <= _training(rows + more_rows, length + longer, "baseline")


def test_devices_beyond_the_effective_batch_hold_less_of_it() -> None:
    assert _training(8, 2048, "baseline", devices=32) < _training(8, 2048, "baseline", devices=4)
    assert _training(8, 2048, "baseline", devices=4) == _training(8, 2048, "baseline")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(100, 900), min_size=1, max_size=12), st.integers(1, 9))
def test_an_evaluation_is_held_by_the_largest_batch_that_it_makes(lengths: list[int], batch_size: int) -> None:
    experiment = load_experiment("pocket", [f"evaluation.batch_size={batch_size}", "arms={baseline: {}}"])
    corpus = CorpusSize(1e6, 4e6, {"test": np.array(lengths) - 1}, "test")
    sizes = Sizes(experiment, read_shape(experiment.model), corpus)
    held = host_memory(sizes, Machine("cpu", "fp32", "sdpa", 0), Node("evaluate", "baseline"))
    batches = fixed_batches(lengths, 256, 128, batch_size, 4096)
    logits = 4 * 4096 * max(len(b) * (max(w.end - w.start for w in b) - 1) for b in batches)
    weights = 4 * sizes.shape.num_parameters
    assert 1.5 * weights + logits <= held <= max(2 * weights, 1.5 * weights + 3 * logits)


def test_a_teacher_takes_its_weights_and_what_is_compared() -> None:
    def taught(*overrides: str, devices: int = 1) -> float:
        return _training(2, 512, "baseline", devices=devices, overrides=overrides)

    plain, shape = taught(), read_shape(load_experiment("smollm2-135m").model)
    for phase in ("blocks", "logits"):
        assert taught(f"training.distill.{phase}=0.5") > plain + 4 * shape.num_parameters
    divided = taught("training.parallel=fsdp", "training.distill.blocks=0.5", devices=4)
    assert divided - taught("training.parallel=fsdp", devices=4) < taught("training.distill.blocks=0.5") - plain


def test_masters_cost_and_recomputation_saves() -> None:
    assert _training(8, 2048, "baseline") < _training(8, 2048, "monotonic")
    assert _training(8, 2048, "baseline", checkpointing=True) < 0.6 * _training(8, 2048, "baseline")
