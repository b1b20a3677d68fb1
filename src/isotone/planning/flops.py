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
        scored: tokens of each for which logits are computed; of an encoder-decoder the target, the rest being the
            source.
        before: tokens of each that come from a cache.
    """
    return sequences * (_blocks(shape, length, scored, before) + 2 * shape.head_weights * scored)


def training_flops(
    shape: ModelShape, sequences: float, length: float, checkpointing: bool = False, target: float | None = None
) -> float:
    """Return the cost of a forward and a backward pass over weights: 3 forwards, or 4 of recomputed blocks.

    ``target`` is how many of a row's tokens an encoder-decoder writes; the others it reads.
    """
    scored = length if target is None else target
    forward = forward_flops(shape, sequences, length, scored)
    return 3 * forward + (sequences * _blocks(shape, length, scored, 0) if checkpointing else 0)


def generation_flops(shape: ModelShape, sequences: float, source: float, target: float, beams: int) -> float:
    """Return the cost of writing ``target`` tokens for each source by beam search, with a cache, to the end."""
    read = _encoder(shape, source)
    written = _decoder(shape, source, target) + 2 * shape.head_weights * target
    return sequences * (read + beams * written)


def gradient_flops(shape: ModelShape, sequences: float, length: float, scored: float) -> float:
    """Return the cost of the gradient at the input embeddings of a frozen model: 2 forwards."""
    return 2 * forward_flops(shape, sequences, length, scored)


def _blocks(shape: ModelShape, length: float, scored: float, before: float) -> float:
    """Return the cost of all blocks for one sequence."""
    if not shape.encoder_layers:
        return _layers(shape, length, before) * length
    return _encoder(shape, length - scored) + _decoder(shape, length - scored, scored)


def _encoder(shape: ModelShape, source: float) -> float:
    """Return the cost of an encoder, whose tokens attend to the whole source."""
    return shape.encoder_layers * source * (2 * shape.layer_weights + 4 * shape.query * source)


def _decoder(shape: ModelShape, source: float, target: float) -> float:
    """Return the cost of a decoder, with the keys and values that it takes of the source."""
    own = target * (2 * shape.layer_weights + 4 * shape.query * target / 2)
    cross = 4 * shape.hidden * shape.query * (source + target) + 4 * shape.query * source * target
    return shape.cross_layers * (own + cross)


def _layers(shape: ModelShape, length: float, before: float) -> float:
    """Return the cost of all blocks for one token."""
    attention = 4 * shape.query * (before + length / 2)
    return shape.layers * (2 * shape.layer_weights + attention)
