"""Floating-point operations of passes through a model, from its sizes.

A forward pass costs 2 operations for each entry of a matrix and token, and 4·d_attn for each key that a token attends
to, half of the sequence on average (Kaplan et al. 2020, 2001.08361, section 2.1: C_forward ≈ 2N + 2·n_layer·n_ctx·d
a token, embeddings left out, with the head counted here where logits are computed). A backward pass costs as much for
the gradients of activations, and again as much for those of weights (the 6N of Kaplan et al. and of Chowdhery et al.
2022, 2204.02311, appendix B, who count the whole sequence where a causal kernel computes half of it).
"""

from isotone.planning.shape import ModelShape


def forward_flops(shape: ModelShape, sequences: float, length: float, scored: float, before: float = 0) -> float:
    """Return the cost of a forward pass.

    Args:
        shape: sizes of the model.
        sequences: number of sequences.
        length: tokens of each that are computed.
        scored: tokens of each for which logits are computed.
        before: tokens of each that come from a cache.
    """
    layers = _layers(shape, length, before) * sequences * length
    return layers + 2 * shape.head_weights * sequences * scored


def training_flops(shape: ModelShape, sequences: float, length: float, checkpointing: bool = False) -> float:
    """Return the cost of a forward and a backward pass over weights: 3 forwards, or 4 of recomputed blocks."""
    forward = forward_flops(shape, sequences, length, length)
    recomputed = _layers(shape, length, 0) * sequences * length if checkpointing else 0
    return 3 * forward + recomputed


def gradient_flops(shape: ModelShape, sequences: float, length: float, scored: float) -> float:
    """Return the cost of the gradient at the input embeddings of a frozen model: 2 forwards."""
    return 2 * forward_flops(shape, sequences, length, scored)


def _layers(shape: ModelShape, length: float, before: float) -> float:
    """Return the cost of all blocks for one token."""
    attention = 4 * shape.query * (before + length / 2)
    return shape.layers * (2 * shape.layer_weights + attention)
