"""The feed-forward networks of a model in memory, and the matrices that a scope constrains.

Shapes: matrices are handled as (out, in), whatever a module stores; T is the number of tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isotone.constraint.architectures import Architecture, architecture_of, projections_of, row_name
from isotone.constraint.layers import Layers, resolve_layers
from isotone.errors import UsageError


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network u ↦ W2 σ(W1 u + b1) + b2, or W2 (σ(W_gate u) ⊙ W1 u) where it is gated."""

    block: str
    """Path of the block."""
    names: dict[str, str]
    """Full paths of ``up``, ``down``, ``attention_out`` and, if gated, ``gate``."""
    up: nn.Module
    down: nn.Module
    activation: nn.Module
    activation_path: str
    attention_out: nn.Module
    gate: nn.Module | None

    def hidden(self, u: Tensor) -> Tensor:
        """Return the hidden units (…, h) of inputs ``u`` (…, d), computed in the dtype of ``u``."""
        up = affine(self.up, u)
        return self.activation(up) if self.gate is None else self.activation(affine(self.gate, u)) * up

    def __call__(self, u: Tensor) -> Tensor:
        """Return the network's output (…, d) for inputs ``u`` (…, d), computed in the dtype of ``u``."""
        return affine(self.down, self.hidden(u))


def architecture_of_model(model: PreTrainedModel) -> Architecture:
    """Return the table's row for a model.

    Raises:
        UsageError: the architecture is not in the table.
    """
    return architecture_of(row_name(model.config.model_type, getattr(model.config, "feed_forward_proj", None)))


def feed_forwards(model: PreTrainedModel, layers: Layers | None = None) -> list[FeedForward]:
    """Return the feed-forward networks of the model, or of the blocks that ``layers`` names.

    The first block comes first, and an encoder's before the decoder's.

    Raises:
        UsageError: the architecture is unknown, the model is not laid out as the table says, or it has no such block.
    """
    architecture = architecture_of_model(model)
    try:
        blocks = [
            (stack, f"{stack.blocks}.{i}")
            for stack in architecture.stacks
            for i in range(len(model.get_submodule(stack.blocks)))  # type: ignore[arg-type]
        ]
        return [_feed_forward(model, *blocks[i]) for i in resolve_layers(layers, len(blocks))]
    except AttributeError as error:
        kind = "an encoder-decoder" if architecture.encoder else "a causal"
        raise UsageError(
            f"model.source: {type(model).__name__} is not laid out like {kind} {architecture.model_type} ({error}); "
            f"expected in each block: {', '.join(architecture.scopes[architecture.widest_scope])}. Use a model that "
            f"transformers itself loads as {architecture.model_type}"
        ) from error


def _feed_forward(model: PreTrainedModel, architecture: Architecture, block: str) -> FeedForward:
    paths = {
        "up": architecture.up,
        "down": architecture.down,
        "attention_out": architecture.attention_out,
        **({"gate": architecture.gate} if architecture.gate else {}),
    }
    names = {role: f"{block}.{path}" for role, path in paths.items()}
    modules = {role: model.get_submodule(name) for role, name in names.items()}
    for role, module in modules.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise UsageError(
                f"model.source: {names[role]} is a {type(module).__name__}; only Linear and Conv1D can be constrained"
            )
    path, gate = f"{block}.{architecture.activation}", modules.pop("gate", None)
    return FeedForward(block, names, activation=model.get_submodule(path), activation_path=path, gate=gate, **modules)


def constrained_modules(model: PreTrainedModel, scope: str, layers: Layers | None = None) -> dict[str, nn.Module]:
    """Return the modules whose weight a scope constrains (in the given blocks), by full path, first block first.

    Raises:
        UsageError: unknown architecture, a scope that matches nothing in it, or a block that is not there.
    """
    architecture, networks = architecture_of_model(model), feed_forwards(model, layers)
    return {
        name: model.get_submodule(name)
        for stack in architecture.stacks
        for network in networks
        if network.block.startswith(f"{stack.blocks}.")
        for path in projections_of(stack, scope)
        for name in [f"{network.block}.{path}"]
    }


def require_finite(model: PreTrainedModel, beside: Mapping[str, nn.Module] | None = None) -> None:
    """Refuse a model with an infinite parameter, or one that is no number.

    Args:
        model: what is looked at.
        beside: modules by full path, of which this is not asked.

    Raises:
        UsageError: there is one; names it.
    """
    left_out = {id(p) for module in (beside or {}).values() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in left_out and (count := int((~torch.isfinite(parameter.detach())).sum())):
            raise UsageError(
                f"model.source: {name} has {count} of {parameter.numel()} entries that are not finite; give a sound one"
            )


def matrix(module: nn.Module) -> Tensor:
    """Return a module's weight as (out, in); a view, so that writing to it writes to the module."""
    weight: Tensor = module.weight.data  # type: ignore[union-attr, assignment]
    return weight.T if isinstance(module, Conv1D) else weight


_ROWS = 4096


def change_rows(w_mn: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a matrix's rows, in place, by what becomes of them in fp64: some at a time, as embeddings have many."""
    for part_kn in w_mn.split(_ROWS):
        part_kn.copy_(change(part_kn.double()))


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a module's bias (out,), without gradient, or None."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return None if bias is None else bias.data


def affine(module: nn.Module, x: Tensor) -> Tensor:
    """Return the module's map of ``x`` (…, in), computed in the dtype of ``x``."""
    bias = bias_of(module)
    return nn.functional.linear(x, matrix(module).to(x.dtype), None if bias is None else bias.to(x.dtype))


def probe_tokens(model: PreTrainedModel, generator: torch.Generator | None = None, length: int = 16) -> Tensor:
    """Return random token ids (2, length) on the model's device, for checks that need a forward pass."""
    generator = generator or torch.Generator().manual_seed(0)
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    return torch.randint(model.config.vocab_size, (2, length), generator=generator).to(model.device)


def probe_logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Return the logits of a plain forward pass; both sides of an encoder-decoder read the tokens."""
    decoded = {"decoder_input_ids": tokens_BT} if model.config.is_encoder_decoder else {}
    return model(tokens_BT, **decoded, use_cache=False).logits


def in_eval_mode(model: PreTrainedModel, run: Callable[[], Tensor]) -> Tensor:
    """Run a forward pass without dropout and gradients and put the model's mode back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return run()
    finally:
        model.train(training)
