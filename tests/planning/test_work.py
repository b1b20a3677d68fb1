"""Work is counted as the stages do it: the steps of a training, the windows of an evaluation, the saves."""

from types import SimpleNamespace

import numpy as np
import pytest
from planned import planned
from tiny_models import tiny_model

from isotone.config import Training
from isotone.config_io import load_experiment
from isotone.pipeline.graph import Node
from isotone.planning.corpus import corpus_size
from isotone.planning.flops import forward_flops, training_flops
from isotone.planning.shape import read_shape, shape_of
from isotone.planning.work import evaluation_flops, node_work, num_saves


def test_training_counts_the_steps_that_the_loop_makes() -> None:
    sizes = planned("training.epochs=0.5", "training.validate_every_steps=null", "training.validation_rows=1")
    steps = sizes.steps(sizes.experiment.training)
    assert steps == -(-(1_000_000 // 256 // 16) // 2)
    per_step = training_flops(sizes.shape, 16, 256)
    assert node_work(sizes, Node("train", "baseline")).train == pytest.approx(steps * per_step)


def test_a_teacher_is_loaded_and_computes_in_its_share_of_the_steps() -> None:
    plain, taught = (planned("training.epochs=1", f"training.distill.logits={share}") for share in (0, 0.5))
    steps = plain.steps(plain.experiment.training)
    before, now = (node_work(sizes, Node("train", "baseline")) for sizes in (plain, taught))
    forward = forward_flops(plain.shape, 16, 256, 256)
    assert now.train - before.train == pytest.approx(0.5 * steps * forward)
    assert now.loaded - before.loaded == pytest.approx(4 * plain.shape.num_parameters)


def test_operations_are_six_for_each_entry_and_token_and_the_attention_of_a_causal_model() -> None:
    shape = read_shape(load_experiment("pythia-1.4b").model)
    per_token = training_flops(shape, 1, 2048) / 2048
    entries = 24 * 12 * 2048**2 + 50304 * 2048
    assert per_token == pytest.approx(6 * entries + 3 * 2 * 24 * 2048 * 2048)


def test_recomputation_costs_a_third_more_of_the_blocks() -> None:
    shape = shape_of("x", tiny_model("llama").config.to_dict(), "test")
    plain, recomputed = (training_flops(shape, 2, 32, again) for again in (False, True))
    assert recomputed - plain == pytest.approx(forward_flops(shape, 2, 32, 0))


def test_overlapping_windows_are_paid_for() -> None:
    sizes = planned()
    lengths = np.array([4000])
    once = evaluation_flops(sizes.shape, lengths, 250, 249, 8)
    twice = evaluation_flops(sizes.shape, lengths, 250, 125, 8)
    assert 1.4 < twice / once < 2


def test_saves_that_coincide_are_made_once() -> None:
    recipe = Training(save_every_steps=20, validate_every_steps=30, epochs=1)
    steps = {step for step in range(1, 121) if step % 20 == 0 or step % 30 == 0}
    assert num_saves(recipe, 120) == len(steps) + 1


def test_stated_tokens_go_before_estimates() -> None:
    experiment = load_experiment("pythia-1.4b")
    shape = read_shape(experiment.model)
    size = corpus_size(experiment.data, shape, SimpleNamespace(__truediv__=None), 1e9)  # type: ignore[arg-type]
    assert size.train_tokens == pytest.approx(1e9)
