"""Peak memory of each kind of node, in bytes: what is allocated, term by term, in the order in which it is needed.

Activations are those that autograd keeps of a block (counted with saved-tensor hooks on transformers' own modules, see
docs/plan.md). On the CPU, freed tensors below 32 MiB stay with the allocator (glibc's largest M_MMAP_THRESHOLD), so
that a save comes on top of them; larger ones go back to the system at once.
"""

from dataclasses import dataclass, replace

import numpy as np

from isotone.config import NO_ARMS, Training
from isotone.pipeline.graph import MEASURES, Node
from isotone.planning.attack_work import SKIPPED, trigger_length
from isotone.planning.shape import ModelShape
from isotone.planning.sizes import Sizes
from isotone.planning.work import LONGEST_WINDOW

SHARD = 1 << 30
"""Largest file of a checkpoint; as in training/checkpoint.py."""

CHUNK = 1 << 24
"""Logits that are raised to fp32 together; as in scoring.py."""

LOGIT_ELEMENTS = 1 << 28
"""Most logits of one evaluation pass; as in evaluation/windows.py."""

SEQUENCES = 16
"""Sequences in one pass of an attack; as in attacks/scoring.py."""

TOKENIZER = 1_700
"""Bytes that a tokenizer and what attacks may write take in memory, for each entry of the vocabulary."""

PACKING = 30_000_000
"""Bytes of a shard of text with its tokens and signatures while it is packed."""

FRAGMENTATION = 1.1
"""What glibc's allocator holds beside what is allocated, where tensors of many sizes come and go."""

RETAINED = 0.5
"""Share of a checkpoint's memory that is not used again once it is freed: seen on 7M and 135M parameters."""

CUDA_CONTEXT = 1_000_000_000
"""Device memory that CUDA's context, cuBLAS's workspace and the allocator's rounding take: assumed, not measured."""


@dataclass(frozen=True)
class Machine:
    """What memory depends on beside the experiment.

    Attributes:
        device: cpu, cuda or mps.
        precision: fp32, bf16 (autocast) or pure_bf16.
        attention: sdpa or eager.
        baseline: bytes of a process that has imported everything and computed nothing.
        devices: processes that share a training, a device each.
    """

    device: str
    precision: str
    attention: str
    baseline: float
    devices: int = 1


def host_memory(sizes: Sizes, machine: Machine, node: Node) -> float:
    """Return a node's peak of host memory."""
    shape = sizes.shape
    weights = 4 * (sizes.parameters(node.arm) if node.arm else shape.num_parameters)
    tokenizer = TOKENIZER * shape.vocabulary
    if node.kind == "setup":
        return machine.baseline + PACKING + tokenizer
    if node.kind == "aggregate":
        return machine.baseline + PACKING + tokenizer
    if machine.device == "cpu":
        own = tokenizer if node.kind in MEASURES and node.kind != "evaluate" else 0
        return machine.baseline + own + _computing(sizes, machine, node, copies=True)
    # weights are read on the host and then moved; a save brings a shard back, as bytes and as a file's contents
    loading = 2 * weights if node.kind != "train" else weights + shape.stored_bytes
    saving = 3 * min(SHARD, 2 * weights) if node.kind in ("train", "constrain", "match") else 0
    return machine.baseline + tokenizer + max(loading, saving)


def device_memory(sizes: Sizes, machine: Machine, node: Node) -> float | None:
    """Return a node's peak of device memory; None where it uses no device of its own."""
    if machine.device != "cuda" or node.kind in ("setup", "aggregate"):
        return None
    return CUDA_CONTEXT + _computing(sizes, machine, node, copies=False)


def _computing(sizes: Sizes, machine: Machine, node: Node, copies: bool) -> float:
    """Return what a node allocates on the device where it computes; ``copies``: saves are made there, too."""
    arm = node.arm or ""
    match node.kind:
        case "train":
            return training_memory(sizes, machine, arm, copies)
        case "match" if (matched := sizes.experiment.arms[arm].matched_loss) and matched.by == "undertrained":
            # what learns, and beside it what is measured and the two checkpoints between which it is interpolated
            learning = training_memory(sizes, replace(machine, devices=1), sizes.experiment.arms[arm].start, copies)
            return learning + 3 * 4 * sizes.parameters(arm)
        case "constrain":
            # what a rotation takes until the model is found the same
            before = sizes.parameters(arm) if sizes.rotated(arm) else 0
            weights = 4 * (sizes.parameters(arm) + before + sizes.constrained(arm))
            return weights + (2 * min(SHARD, 4 * sizes.parameters(arm)) if copies else 0)
        case "evaluate":
            return _loaded(sizes, arm, _evaluating(sizes), copies)
        case "triggers":
            return _loaded(sizes, arm, _searching(sizes), copies)
        case "probe":
            return _loaded(sizes, arm, _probing(sizes), copies)
        case _:
            return _loaded(sizes, arm, _flipping(sizes), copies)


def training_memory(sizes: Sizes, machine: Machine, arm: str, copies: bool) -> float:
    """Return the peak of a training: weights, masters, optimizer, gradients, activations, logits, and a save."""
    shape, recipe = sizes.shape, sizes.experiment.training_of(arm)
    share = recipe.micro_batch * recipe.accumulation // machine.devices
    rows, length = max(1, min(recipe.micro_batch, share)), sizes.experiment.data.row_length
    width = 2 if machine.precision == "pure_bf16" else 4
    parameters, masters = sizes.parameters(arm), sizes.constrained(arm)
    states: float = width * (3 * parameters + masters)
    gradients: float = width * parameters
    if machine.devices > 1 and getattr(recipe, "parallel", "ddp") == "fsdp":
        # a part of everything, and the whole weights of the block under way
        states, gradients = states / machine.devices, gradients / machine.devices
        states += width * (shape.layer_weights + shape.head_weights)
    casts = 2 * (shape.layers * shape.layer_weights + shape.head_weights) if machine.precision == "bf16" else 0
    kept = gradients + casts + _activations(shape, recipe, machine, rows, length)
    if machine.device == "cpu":
        kept *= FRAGMENTATION
    data = sizes.experiment.data
    scored = data.target_length if data.pairs else length - 1
    logits = _logits(rows * scored * shape.vocabulary, machine.precision)
    if recipe.distill.share:
        divided = machine.devices if recipe.parallel == "fsdp" else 1
        start = sizes.experiment.arms[arm].start
        states += width * (shape.num_parameters if start in NO_ARMS else sizes.parameters(start)) / divided
        logits += _teaching(shape, recipe, rows, length)
    if not copies:
        return states + kept + logits
    save = 2 * min(SHARD, width * 2 * parameters)
    return states + kept + max(logits, save)


def _teaching(shape: ModelShape, recipe: Training, rows: int, length: int) -> float:
    """Return what a distilled step holds beside a plain one and its teacher's weights.

    Where blocks are matched: the teacher's states, and differences that the backward pass needs. Where predictions are:
    the teacher's logits, both log-softmaxes, and gradients of one.
    """
    blocks = 8 * shape.hidden * shape.layers * rows * length if recipe.distill.blocks else 0
    logits = 20 * rows * (length - 1) * shape.vocabulary if recipe.distill.logits else 0
    return max(blocks, logits) + _inference(shape, rows * length, 0)


def _activations(shape: ModelShape, recipe: Training, machine: Machine, rows: int, length: int) -> float:
    """Return what autograd keeps of all blocks, and what the backward pass of one of them needs beside it."""
    low = machine.precision != "fp32"
    block = layer_bytes(shape, length, low, machine.attention)
    widest = 3 * shape.intermediate * (2 if low else 4)
    outside = (12 if low else 8) * shape.hidden
    blocks = 4 * shape.hidden * shape.layers + block if recipe.gradient_checkpointing else block * shape.layers
    return rows * length * (blocks + widest + outside)


def layer_bytes(shape: ModelShape, length: int, low: bool, attention: str = "sdpa", frozen: bool = False) -> float:
    """Return the bytes a token that autograd keeps of one block.

    Args:
        shape: sizes of the model.
        length: tokens of a sequence.
        low: matrices are multiplied in bf16.
        attention: sdpa or eager; eager, and dropout under sdpa on the CPU, keep the scores.
        frozen: weights need no gradients, so that inputs of their multiplications are not kept.
    """
    width = 2 if low else 4
    hidden, query, key, wide = shape.hidden, shape.query, shape.key, shape.intermediate
    slow_gelu = shape.config.get("activation_function", "gelu_new" if shape.model_type == "gpt2" else "") == "gelu_new"
    if shape.layer_norm:
        residual = 4 * hidden * (1 if shape.parallel else 2)
        inner = (5 if slow_gelu else 2) * wide if not frozen else (4 if slow_gelu else 1) * wide
        heads = (7 if shape.rotary_layer_norm else 4) * query
        if frozen:
            heads -= query if shape.rotary_layer_norm else 0
        else:
            inner += 2 * hidden
        dropout = (2 * hidden * width + 12 * shape.heads * length) if shape.dropout and not frozen else 0
        return residual + width * (heads + inner) + dropout + _scores(shape, length, low, attention)
    heads = 2 * query + 2 * key
    if frozen:
        return 4 * 2 * hidden + width * (heads + (3 if shape.gated else 1) * wide)
    norms = (16 + 10) * hidden if low else 24 * hidden
    return norms + width * (heads + (4 if shape.gated else 2) * wide) + _scores(shape, length, low, attention)


def _scores(shape: ModelShape, length: int, low: bool, attention: str) -> float:
    return (6 if low else 4) * shape.heads * length if attention == "eager" else 0


def _logits(elements: float, precision: str) -> float:
    """Return the peak of logits, their log-softmax and their gradients in a training's backward pass."""
    if precision == "fp32":
        return 8 * elements
    return 6 * elements + 8 * min(elements, CHUNK)


def _loaded(sizes: Sizes, arm: str, computing: float, copies: bool) -> float:
    """Return the peak of a stage that loads an arm's end and computes with it.

    The model of the arm before may still wait for the garbage collector. On the CPU a part of what a checkpoint was
    read into stays with the allocator while computing; on another device it never was.
    """
    weights, masters = 4 * sizes.parameters(arm), 4 * sizes.constrained(arm)
    before = weights if len(sizes.experiment.arms) > 1 else 0
    if copies:
        return before + weights + masters + max(weights, RETAINED * weights + FRAGMENTATION * computing)
    return before + weights + max(masters, computing)


def _inference(shape: ModelShape, tokens: float, elements: float, ranked: bool = False) -> float:
    """Return what a pass without gradients holds: one block's widest tensors, logits, a chunk's softmax (and ranks)."""
    widest = 4 * (3 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate)
    return tokens * widest + 4 * elements + (13 if ranked else 4) * min(elements, CHUNK)


def _evaluating(sizes: Sizes) -> float:
    """Return what the first batch of an evaluation takes: that of the longest windows."""
    config, shape, data = sizes.experiment.evaluation, sizes.shape, sizes.experiment.data
    count = sizes.num_documents(config.split, config.num_documents)
    if data.pairs:
        return _of_pairs(sizes, min(config.batch_size, max(1, count)))
    lengths = sizes.corpus.document_tokens[config.split][:count] + 1
    context = config.context or min(shape.context, LONGEST_WINDOW)
    length = max(2, min(context, int(lengths.max(initial=1))))
    stride = config.stride or max(1, context // 2)
    num_windows = int((1 + np.maximum(0, -(-(lengths - context) // stride))).sum())
    most = LOGIT_ELEMENTS // ((length - 1) * shape.vocabulary)
    rows = max(1, min(config.batch_size, most, num_windows))
    return _inference(shape, rows * length, rows * (length - 1) * shape.vocabulary)


def _of_pairs(sizes: Sizes, rows: int) -> float:
    """Return what scoring a batch of pairs takes, or writing one: each beam has keys and values, and its logits."""
    shape, data, rouge = sizes.shape, sizes.experiment.data, sizes.experiment.evaluation.rouge
    scored = _inference(shape, rows * data.row_length, rows * data.target_length * shape.vocabulary)
    if rouge is None:
        return scored
    beams = rouge.batch_size * rouge.beams
    tokens = (rouge.max_tokens or data.target_length) + data.source_length
    cache = 2 * 4 * 2 * shape.cross_layers * shape.key * beams * tokens  # twice: beams are put in another order
    return max(scored, cache + _inference(shape, beams * data.source_length, 3 * beams * shape.vocabulary))


def _flipping(sizes: Sizes) -> float:
    config, shape = sizes.experiment.attacks, sizes.shape
    protocol, tests = config.protocol, sizes.num_documents("attack_test", config.num_documents, config.protocol.length)
    documents = max(1, min(SEQUENCES, config.batch_documents, tests))
    embeddings = 4 * shape.head_weights
    scores = 4 * shape.vocabulary * protocol.num_attackable
    gains = (documents + 5) * scores  # all documents' gains wait for the one that is ranked
    cache = 4 * 2 * shape.layers * shape.key * protocol.length * (documents + SEQUENCES)
    return embeddings + max(
        gains + cache,
        _gradient(shape, documents, protocol.length, protocol.num_scored) + cache,
        _gradient(shape, documents, protocol.length, protocol.length - 1),
        cache + _inference(shape, SEQUENCES * protocol.length, SEQUENCES * protocol.num_scored * shape.vocabulary),
        _judging(shape, documents, protocol.length),
    )


def _probing(sizes: Sizes) -> float:
    """Return what a probe takes: one text's gradient and cache, then batches of that text with one edit each."""
    protocol, shape = sizes.experiment.attacks.protocol, sizes.shape
    cache = 4 * 2 * shape.layers * shape.key * protocol.length * (1 + SEQUENCES)
    batch = _inference(shape, SEQUENCES * protocol.length, SEQUENCES * protocol.num_scored * shape.vocabulary)
    return 4 * shape.head_weights + max(
        _gradient(shape, 1, protocol.length, protocol.num_scored) + cache, cache + batch
    )


def _searching(sizes: Sizes) -> float:
    config, shape = sizes.experiment.attacks, sizes.shape
    text = trigger_length(sizes)
    length, scored = 1 + config.triggers.length + text, text - SKIPPED
    gains = 6 * 4 * shape.vocabulary * config.triggers.length
    return 4 * shape.head_weights + max(
        gains,
        _gradient(shape, min(SEQUENCES, config.triggers.batch_size), length, scored),
        _inference(shape, SEQUENCES * length, SEQUENCES * scored * shape.vocabulary),
        _judging(shape, min(SEQUENCES, config.batch_documents), length),
    )


def _gradient(shape: ModelShape, rows: int, length: int, scored: int) -> float:
    kept = rows * length * shape.layers * layer_bytes(shape, length, low=False, frozen=True)
    return kept + 8 * rows * scored * shape.vocabulary


def _judging(shape: ModelShape, rows: int, length: int) -> float:
    return _inference(shape, rows * length, rows * (length - 1) * shape.vocabulary, ranked=True)
