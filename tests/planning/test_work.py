"""Work is counted as the stages do it: the steps of a training, the windows of an evaluation, the saves."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planned import planned
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from isotone.config import Arm, Constraint, Data, MatchedLoss, Training
from isotone.config_io import load_experiment
from isotone.pipeline.graph import Node
from isotone.planning.corpus import corpus_size
from isotone.planning.flops import forward_flops, generation_flops, training_flops
from isotone.planning.memory import Machine, host_memory
from isotone.planning.shape import read_shape, shape_of
from isotone.planning.sizes import Sizes
from isotone.planning.work import BLOCK_STEP_S, evaluation_flops, node_work, num_saves


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


def test_an_arm_whose_head_is_untied_has_a_matrix_more() -> None:
    plain = planned()
    arms = {
        "baseline": Arm(),
        "rotated": Arm(constraint=Constraint(parametrization="projection", initialization="rotated_nnls")),
        "further": Arm(start="rotated"),
        "colder": Arm(start="baseline", train=False, matched_loss=MatchedLoss(to="rotated", by="temperature")),
        "noisy": Arm(start="baseline", train=False, matched_loss=MatchedLoss(to="rotated", by="noise")),
    }
    experiment = plain.experiment.model_copy(update={"arms": arms})
    for tied in (True, False):
        sizes = Sizes(experiment, replace(plain.shape, tied=tied), plain.corpus)
        more = sizes.shape.head_weights if tied else 0
        assert [sizes.parameters(arm) - sizes.shape.num_parameters for arm in arms] == [0, more, more, more, 0]
        saved = [node_work(sizes, Node("train", arm)).saved for arm in ("baseline", "rotated")]
        assert (saved[1] > saved[0]) is tied


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


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_operations_of_an_encoder_decoder_are_those_that_torch_counts(name: str) -> None:
    """Its matrices exactly; a causal attention is counted at half of what torch computes, so it is left out of both."""
    model = tiny_model(name)
    shape = shape_of(name, model.config.to_dict(), "test")
    source, target = torch.randint(2, 64, (1, 24)), torch.randint(2, 64, (1, 10))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=source, decoder_input_ids=target)
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(flops for kind, flops in counted.items() if "mm" in str(kind) and "bmm" not in str(kind))
    width = shape.query
    attention = shape.encoder_layers * 4 * width * 24 * 24 + shape.cross_layers * 4 * width * (10 * 5 + 24 * 10)
    assert forward_flops(shape, 1, 34, 10) - attention == matrices


def test_pairs_are_planned_by_their_rows_and_writing_by_beams() -> None:
    settings = ("data={source: bible-pairs, source_length: 96, target_length: 64}", "training.epochs=1")
    plain = planned(*settings, length=160)
    shape = shape_of("t5", tiny_model("t5").config.to_dict(), "test")
    sizes = [replace(p, shape=shape) for p in (plain, planned(*settings, "evaluation.rouge={beams: 4}", length=160))]
    assert sizes[0].steps(sizes[0].experiment.training) == 1_000_000 // 160 // 16
    without, with_rouge = (node_work(s, Node("evaluate", "baseline")) for s in sizes)
    written = generation_flops(shape, 50, 96, 64, 4)
    assert with_rouge.evaluate - without.evaluate == pytest.approx(written)
    assert with_rouge.constant_s - without.constant_s == pytest.approx(7 * 64 * 2 * BLOCK_STEP_S)  # batches of 8
    assert generation_flops(shape, 50, 96, 64, 8) < 2 * written  # the source is read once
    memory = [host_memory(s, Machine("cpu", "fp32", "sdpa", 0), Node("evaluate", "baseline")) for s in sizes]
    assert memory[0] < memory[1]


def test_pairs_of_a_file_are_counted_by_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"s": "a", "t": "b"}\n' * 100)
    data = Data(source=str(tmp_path / "a.jsonl"), source_field="s", target_field="t")
    shape = shape_of("t5", tiny_model("t5").config.to_dict(), "test")
    size = corpus_size(data, shape, tmp_path / "packed", None)
    assert size.train_tokens == 80 * data.row_length
    assert len(size.document_tokens["test"]) == 5
