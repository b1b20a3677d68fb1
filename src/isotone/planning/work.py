"""What each node of a run has to do: operations, optimizer entries, bytes. Seconds are these divided by rates."""

import math

import numpy as np

from isotone.config import NO_ARMS, Training
from isotone.evaluation.windows import fixed_batches
from isotone.pipeline.graph import FURTHER_ATTACKS, Node
from isotone.planning import attack_work
from isotone.planning.flops import forward_flops, generation_flops, training_flops
from isotone.planning.shape import ModelShape
from isotone.planning.sizes import Sizes, Work

LONGEST_WINDOW = 2048
"""Of evaluation, unless the experiment says otherwise; as in pipeline/stages/evaluate.py."""

EVALUATIONS = 20
"""Models that the search of a matched loss measures: on the pocket model it was 16 to 20."""


BLOCK_STEP_S = 0.003
"""Seconds that a block takes to be asked for one more token, however little there is to compute: assumed."""


def node_work(sizes: Sizes, node: Node) -> Work:
    """Return what one node has to do."""
    arm = node.arm or ""
    match node.kind:
        case "setup":
            return Work(packed=sizes.corpus.text_bytes, tokenizers=1, constant_s=1)
        case "constrain":
            weights = 4 * sizes.parameters(arm)
            start = _start(sizes, arm)
            return Work(optimizer=sizes.constrained(arm), saved=weights, constant_s=1) + start
        case "train":
            return _training(sizes, arm)
        case "match":
            return _matching(sizes, arm)
        case "evaluate":
            return _evaluation(sizes, arm)
        case "triggers":
            return attack_work.triggers(sizes) + _end(sizes, arm)
        case "hotflip":
            return attack_work.hotflip(sizes, arm) + _end(sizes, arm)
        case kind if kind in FURTHER_ATTACKS:
            return attack_work.further_attack(sizes, kind, arm) + _end(sizes, arm)
        case "probe":
            return attack_work.probe(sizes) + _end(sizes, arm)
        case "transfer":
            return attack_work.transfer(sizes) + _end(sizes, arm)
        case _:
            return Work(tokenizers=1, vocabularies=1, constant_s=2)


def num_saves(recipe: Training, steps: int) -> int:
    """Return how often a training saves, by the clock left out, if every validation is the best so far."""
    every, validate = recipe.save_every_steps, recipe.validate_every_steps
    saves = steps // every + math.ceil(recipe.epochs)
    if validate:
        saves += steps // validate - steps // math.lcm(every, validate)
    return saves


def _start(sizes: Sizes, arm: str) -> Work:
    """Return the loading of what an arm starts from, and the setting up of its constraint."""
    start = sizes.experiment.arms[arm].start
    before = Work(loaded=4 * sizes.shape.num_parameters) if start in NO_ARMS else _end(sizes, start)
    return before + Work(optimizer=sizes.constrained(arm))


def _end(sizes: Sizes, arm: str) -> Work:
    """Return the loading of an arm's end: its start, and its checkpoint over it."""
    return _start(sizes, arm) + Work(saved=0.5 * 4 * sizes.parameters(arm))  # read and hashed, not written


def _training(sizes: Sizes, arm: str) -> Work:
    recipe, shape, length = sizes.experiment.training_of(arm), sizes.shape, sizes.experiment.data.row_length
    target = sizes.experiment.data.target_length if sizes.experiment.data.pairs else length
    steps, batch = sizes.steps(recipe), recipe.micro_batch * recipe.accumulation
    validations = steps // recipe.validate_every_steps if recipe.validate_every_steps else 0
    validations += math.ceil(recipe.epochs)
    rows = min(recipe.validation_rows, int(sizes.corpus.document_tokens["validation"].sum()) // length)
    weights = sizes.weight_bytes(arm)
    return (
        _start(sizes, arm)
        + Work(
            train=steps * training_flops(shape, batch, length, recipe.gradient_checkpointing, target),
            evaluate=validations * forward_flops(shape, rows, length, target),
            optimizer=steps * (sizes.parameters(arm) + 2 * sizes.constrained(arm)),
            saved=weights + 3 * weights * num_saves(recipe, steps),
        )
        + _teaching(sizes, arm, steps * batch)
    )


def _teaching(sizes: Sizes, arm: str, rows: int) -> Work:
    """Return the loading of a teacher, and its passes over its share of the rows that a training reads."""
    share, data = sizes.experiment.training_of(arm).distill.share, sizes.experiment.data
    target = data.target_length if data.pairs else data.row_length
    passes = Work(train=float(share) * forward_flops(sizes.shape, rows, data.row_length, target))
    return passes + _start(sizes, arm) if share else Work()


def _matching(sizes: Sizes, arm: str) -> Work:
    """Return the search of a matched loss; of a training that is repeated, all of it: where it ends is not known."""
    experiment, matched = sizes.experiment, sizes.experiment.arms[arm].matched_loss
    assert matched is not None  # the graph has this node for matched arms only
    protocol = experiment.attacks.protocol
    count = sizes.num_documents("attack_test", experiment.attacks.num_documents, protocol.length)
    one = Work(evaluate=forward_flops(sizes.shape, count, protocol.length, protocol.num_scored))
    again = _training(sizes, experiment.arms[arm].start) if matched.by == "undertrained" else Work()
    return one * EVALUATIONS + _end(sizes, matched.to) + _start(sizes, arm) + again


def _evaluation(sizes: Sizes, arm: str) -> Work:
    experiment, config = sizes.experiment, sizes.experiment.evaluation
    count = sizes.num_documents(config.split, config.num_documents)
    names = {experiment.attacks.checkpoint, *config.checkpoints} if experiment.arms[arm].train else {"last"}
    if experiment.data.pairs:
        return (_scored_pairs(sizes, count) + _end(sizes, arm)) * len(names) + _written_pairs(sizes, count)
    lengths = sizes.corpus.document_tokens[config.split][:count] + 1
    context = config.context or min(sizes.shape.context, LONGEST_WINDOW)
    one = Work(evaluate=evaluation_flops(sizes.shape, lengths, context, config.stride, config.batch_size))
    return (one + _end(sizes, arm)) * len(names)


def _scored_pairs(sizes: Sizes, count: int) -> Work:
    data = sizes.experiment.data
    return Work(evaluate=forward_flops(sizes.shape, count, data.row_length, data.target_length))


def _written_pairs(sizes: Sizes, count: int) -> Work:
    """Return what ROUGE takes: a text for each source, of the one checkpoint that is attacked, as long as it may be."""
    data, rouge = sizes.experiment.data, sizes.experiment.evaluation.rouge
    if rouge is None:
        return Work()
    number, longest = min(count, rouge.num_documents or count), rouge.max_tokens or data.target_length
    steps = -(-number // rouge.batch_size) * longest
    return Work(
        evaluate=generation_flops(sizes.shape, number, data.source_length, longest, rouge.beams),
        tokenizers=1,
        constant_s=BLOCK_STEP_S * sizes.shape.cross_layers * steps,
    )


def evaluation_flops(
    shape: ModelShape, lengths: np.ndarray, context: int, stride: int | None, batch_size: int, most: int = 20_000
) -> float:
    """Return the cost of scoring documents of these lengths, in the very windows and batches of an evaluation.

    Args:
        shape: sizes of the model.
        lengths: tokens of each document, the leading one included.
        context: tokens of a window.
        stride: tokens between windows; half the context where None.
        batch_size: windows in one pass.
        most: documents that are laid out; the cost of more is in proportion.
    """
    laid_out = lengths[:most].tolist()
    if not laid_out:
        return 0.0
    batches = fixed_batches(laid_out, context, stride or max(1, context // 2), batch_size, shape.vocabulary)
    total = 0.0
    for windows in batches:
        length = max(window.end - window.start for window in windows)
        scored = length - min(window.first - window.start for window in windows)
        total += forward_flops(shape, len(windows), length, scored)
    return total * len(lengths) / len(laid_out)
