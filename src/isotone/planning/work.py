"""What each node of a run has to do: operations, optimizer entries, bytes. Seconds are these divided by rates."""

import math
from dataclasses import dataclass, fields

import numpy as np

from isotone.config import Experiment, Training, epochs_as_fraction
from isotone.evaluation.windows import fixed_batches
from isotone.pipeline.graph import Node
from isotone.planning.corpus import CorpusSize
from isotone.planning.flops import forward_flops, gradient_flops, training_flops
from isotone.planning.shape import ModelShape

LONGEST_WINDOW = 2048
"""Of evaluation, unless the experiment says otherwise; as in pipeline/stages/evaluate.py."""

SKIPPED = 16
"""First tokens of a text that triggers do not score; as in attacks/triggers.py."""

CONTROLS = 16
"""Other sequences that stand in a trigger's place, for each document; as in attacks/trigger_rows.py."""


@dataclass(frozen=True)
class Work:
    """What a node has to do.

    Attributes:
        train: operations of forward and backward passes over weights.
        evaluate: operations of forward passes that score whole texts.
        attack: operations of attacks on a frozen model.
        optimizer: entries that optimizer steps update, and entries that a constraint maps around them.
        loaded: bytes of weights read into memory, in fp32.
        saved: bytes written to checkpoints and read back, those saved by the clock left out.
        packed: bytes of text that are tokenized, compared and packed.
        tokenizers: times that a tokenizer is loaded.
        vocabularies: times that what attacks may write is found out.
        constant_s: seconds that depend on nothing of this.
    """

    train: float = 0
    evaluate: float = 0
    attack: float = 0
    optimizer: float = 0
    loaded: float = 0
    saved: float = 0
    packed: float = 0
    tokenizers: float = 0
    vocabularies: float = 0
    constant_s: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, factor: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


@dataclass(frozen=True)
class Sizes:
    """What all of a plan's arithmetic starts from."""

    experiment: Experiment
    shape: ModelShape
    corpus: CorpusSize

    def constrained(self, arm: str) -> int:
        """Return the constrained weights that have masters beside them; none under ``projection``."""
        constraint = self.experiment.arms[arm].constraint
        if constraint is None or constraint.parametrization == "projection":
            return 0
        if constraint.parametrization is None and constraint.recipe == "recommended" and not self.shape.layer_norm:
            return 0  # projection, too
        return self.shape.constrained(constraint.scope)

    def weight_bytes(self, recipe: Training) -> int:
        """Return the bytes of all weights as they are trained and saved."""
        return self.shape.num_parameters * (2 if recipe.precision == "pure_bf16" else 4)

    def steps(self, recipe: Training) -> int:
        """Return the optimizer steps of a training."""
        rows = int(self.corpus.train_tokens) // self.experiment.data.sequence_length
        per_epoch = max(1, rows // (recipe.micro_batch * recipe.accumulation))
        return math.ceil(epochs_as_fraction(recipe.epochs) * per_epoch)

    def num_documents(self, split: str, limit: int | None, length: int = 1) -> int:
        """Return how many documents of a split are taken: those long enough, at most ``limit``."""
        enough = int((self.corpus.document_tokens[split] >= length).sum())
        return enough if limit is None else min(enough, limit)


def node_work(sizes: Sizes, node: Node) -> Work:
    """Return what one node has to do."""
    arm = node.arm or ""
    match node.kind:
        case "setup":
            return Work(packed=sizes.corpus.text_bytes, tokenizers=1, constant_s=1)
        case "constrain":
            weights = 4 * sizes.shape.num_parameters
            start = _start(sizes, arm)
            return Work(optimizer=sizes.constrained(arm), saved=weights, constant_s=1) + start
        case "train":
            return _training(sizes, arm)
        case "evaluate":
            return _evaluation(sizes, arm)
        case "triggers":
            return triggers(sizes) + _end(sizes, arm)
        case "hotflip":
            return hotflip(sizes) + _end(sizes, arm)
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
    before = Work(loaded=4 * sizes.shape.num_parameters) if start == "pretrained" else _end(sizes, start)
    return before + Work(optimizer=sizes.constrained(arm))


def _end(sizes: Sizes, arm: str) -> Work:
    """Return the loading of an arm's end: its start, and its checkpoint over it."""
    return _start(sizes, arm) + Work(saved=0.5 * 4 * sizes.shape.num_parameters)  # read and hashed, not written


def _training(sizes: Sizes, arm: str) -> Work:
    recipe, shape, length = sizes.experiment.training_of(arm), sizes.shape, sizes.experiment.data.sequence_length
    steps, batch = sizes.steps(recipe), recipe.micro_batch * recipe.accumulation
    validations = steps // recipe.validate_every_steps if recipe.validate_every_steps else 0
    validations += math.ceil(recipe.epochs)
    rows = min(recipe.validation_rows, int(sizes.corpus.document_tokens["validation"].sum()) // length)
    weights = sizes.weight_bytes(recipe)
    return _start(sizes, arm) + Work(
        train=steps * training_flops(shape, batch, length, recipe.gradient_checkpointing),
        evaluate=validations * forward_flops(shape, rows, length, length),
        optimizer=steps * (shape.num_parameters + 2 * sizes.constrained(arm)),
        saved=weights + 3 * weights * num_saves(recipe, steps),
    )


def _evaluation(sizes: Sizes, arm: str) -> Work:
    experiment, config = sizes.experiment, sizes.experiment.evaluation
    count = sizes.num_documents("test", config.num_documents)
    lengths = sizes.corpus.document_tokens["test"][:count] + 1
    context = config.context or min(sizes.shape.context, LONGEST_WINDOW)
    one = Work(evaluate=evaluation_flops(sizes.shape, lengths, context, config.stride, config.batch_size))
    names = {experiment.attacks.checkpoint, *config.checkpoints} if experiment.arms[arm].train else {"last"}
    return (one + _end(sizes, arm)) * len(names)


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


def hotflip(sizes: Sizes) -> Work:
    """Return the attack operations of stage 6 for one arm: every method, published and random edits beside it."""
    config, shape = sizes.experiment.attacks, sizes.shape
    protocol, flips = config.protocol, config.hotflip.flips
    length, scored = protocol.length, protocol.continuation
    tests = sizes.num_documents("attack_test", config.num_documents, length)
    searches = sizes.num_documents("attack_search", config.num_search_documents, length)
    gradient = gradient_flops(shape, 1, length, scored)
    gains = 2 * (protocol.prefix - 1) * shape.head_weights
    # candidates read what stands before their edit from the cache: half of the prefix in the mean
    cached = protocol.prefix / 2
    candidate = forward_flops(shape, 1, length - cached, scored, before=cached)
    clean = forward_flops(shape, 1, length, scored)
    judged = 2 * forward_flops(shape, 1, length, length - 1) + clean  # and once more as decoded and encoded text
    methods = {
        "once": gradient + gains + judged,
        "iterative": flips * (gradient + gains + config.hotflip.candidates * candidate) + judged,
    }
    total = sum(tests * methods[name] for name in config.hotflip.methods)
    total += tests * (gradient_flops(shape, 1, length, length - 1) + 2 * flips * shape.head_weights + judged)
    total += tests * (2 * clean + judged)
    total += searches * ((1 + config.random_draws) * clean + judged)
    # the stage asks the tokenizer for its BOS before every method, published and both random ones included
    return Work(attack=total, tokenizers=1 + len(methods_used(sizes)), vocabularies=1)


def methods_used(sizes: Sizes) -> tuple[str, ...]:
    """Return the variants that stage 6 runs (pipeline/stages/hotflip.py)."""
    return (*sizes.experiment.attacks.hotflip.methods, "published", "random", "random_search")


def trigger_length(sizes: Sizes) -> int:
    """Return the tokens of a text behind a trigger, with BOS before both."""
    config = sizes.experiment.attacks
    return min(sizes.shape.context - config.triggers.length - 1, config.protocol.length)


def trigger_iterations(sizes: Sizes) -> int:
    """Return the iterations of one restart: as asked for, or what the budget buys (attacks/triggers.py)."""
    config = sizes.experiment.attacks.triggers
    if config.budget_tokens is None:
        return config.iterations
    length, searches = 1 + config.length + trigger_length(sizes), _searches(sizes)
    batch = min(config.batch_size, searches)
    iteration = (3 + config.candidates) * batch * length
    affordable = (config.budget_tokens // config.restarts - 2 * searches * length) // max(1, iteration)
    return max(1, min(config.iterations, affordable))


def trigger_tokens(sizes: Sizes) -> int:
    """Return the tokens that a whole search spends, counted as attacks/budget.py counts them."""
    config, searches = sizes.experiment.attacks.triggers, _searches(sizes)
    length, batch = 1 + config.length + trigger_length(sizes), min(config.batch_size, searches)
    iterations = trigger_iterations(sizes) * (3 + config.candidates) * batch
    return config.restarts * length * (iterations + 2 * searches)


def triggers(sizes: Sizes) -> Work:
    """Return the attack operations of stage 5 for one arm: the search, and what the best is worth on held-out texts."""
    config, shape = sizes.experiment.attacks, sizes.shape
    text, searches = trigger_length(sizes), _searches(sizes)
    tests = sizes.num_documents("attack_test", config.num_documents, config.protocol.length)
    length, scored = 1 + config.triggers.length + text, text - SKIPPED
    batch = min(config.triggers.batch_size, searches)
    forward = forward_flops(shape, 1, length, scored)
    iteration = batch * (gradient_flops(shape, 1, length, scored) + config.triggers.candidates * forward)
    iteration += 2 * config.triggers.length * shape.head_weights
    restart = trigger_iterations(sizes) * iteration + 2 * searches * forward
    judged = 2 * forward_flops(shape, 1, length, length - 1) + (1 + CONTROLS) * forward
    attack = config.triggers.restarts * restart + searches * forward + tests * judged
    return Work(attack=attack, tokenizers=1, vocabularies=1)


def _searches(sizes: Sizes) -> int:
    config = sizes.experiment.attacks
    return sizes.num_documents("attack_search", config.num_search_documents, config.protocol.length)
