"""One table: what each architecture calls its feed-forward projections, what feeds them, and which scopes it has.

Imports no torch: ``plan`` and ``config check`` read it too.
"""

from dataclasses import dataclass
from typing import Literal

from isotone.errors import UsageError

NormKind = Literal["layer_norm", "rms_norm"]

SCOPES = ("mlp_in", "mlp_both", "mlp_in_attn_out", "gated_updown", "gated_all")
"""Names of the scopes; the first three belong to plain feed-forward networks, the others to gated ones."""


@dataclass(frozen=True)
class Architecture:
    """Where the feed-forward network of one ``model_type`` is; paths are relative to a block."""

    model_type: str
    """``model_type`` in config.json; ``t5_gated`` is the t5 whose network has a gate (v1.1)."""
    blocks: str
    """Path of the list of blocks, from the language model; of an encoder-decoder, of the decoder's."""
    up: str
    """First projection W1 (gated: the ungated factor)."""
    down: str
    """Second projection W2, which writes to the residual stream."""
    activation: str
    """Module of the activation σ."""
    activation_key: str
    """Key of the activation's name in config.json."""
    norm: NormKind
    """Norm before the network. Documentation and recipes read it; ``shift`` and certificates trace the real one."""
    attention_out: str
    """Output projection of the attention, which writes to the residual stream."""
    gate: str | None = None
    """Gate projection: the network is W2(σ(W_gate u) ⊙ W1 u)."""
    bias: str = "always"
    """``always``, ``never``, or the key of config.json that decides whether W1 and W2 have biases."""
    encoder: "Architecture | None" = None
    """The encoder's blocks, which scopes cover too and before the decoder's; None: there is no encoder."""
    norms_outputs: bool = False
    """Whether what sublayers put out is normed, too, before it is added to the stream."""

    @property
    def gated(self) -> bool:
        """Whether the network multiplies two projections of its input."""
        return self.gate is not None

    @property
    def rotatable(self) -> bool:
        """Whether its stream can be brought into another basis: one stream, of which only RMSNorms speak."""
        return self.norm == "rms_norm" and self.encoder is None and not self.norms_outputs

    @property
    def stacks(self) -> tuple["Architecture", ...]:
        """Every stack of blocks, in the order of the computation."""
        return (self,) if self.encoder is None else (self.encoder, self)

    @property
    def scopes(self) -> dict[str, tuple[str, ...]]:
        """Constrained projections of each scope that the architecture has."""
        if self.gate is not None:
            return {"gated_updown": (self.up, self.down), "gated_all": (self.gate, self.up, self.down)}
        return {
            "mlp_in": (self.up,),
            "mlp_both": (self.up, self.down),
            "mlp_in_attn_out": (self.up, self.attention_out),
        }

    @property
    def widest_scope(self) -> str:
        """Scope that covers the whole feed-forward network."""
        return "gated_all" if self.gated else "mlp_both"


def _plain(model_type: str, blocks: str, up: str, down: str, activation: str, key: str, out: str) -> Architecture:
    return Architecture(model_type, blocks, up, down, activation, key, "layer_norm", out)


def _gated(model_type: str, key: str = "hidden_act", bias: str = "never", norms_outputs: bool = False) -> Architecture:
    """Return the layout that Llama introduced: RMSNorm and a gated network named gate, up and down."""
    return Architecture(
        model_type,
        blocks="model.layers",
        up="mlp.up_proj",
        down="mlp.down_proj",
        activation="mlp.act_fn",
        activation_key=key,
        norm="rms_norm",
        attention_out="self_attn.o_proj",
        gate="mlp.gate_proj",
        bias=bias,
        norms_outputs=norms_outputs,
    )


def _t5(gated: bool) -> Architecture:
    """Return the layout of T5: the decoder's network is the third sublayer of a block, the encoder's the second."""
    paths = ("wi_1", "wo", "act", "wi_0") if gated else ("wi", "wo", "act", None)

    def stack(name: str, sublayer: int, encoder: Architecture | None) -> Architecture:
        up, down, activation, gate = (p and f"layer.{sublayer}.DenseReluDense.{p}" for p in paths)
        return Architecture(
            "t5_gated" if gated else "t5",
            blocks=f"{name}.block",
            up=str(up),
            down=str(down),
            activation=str(activation),
            activation_key="dense_act_fn",
            norm="rms_norm",
            attention_out="layer.0.SelfAttention.o",
            gate=gate,
            bias="never",
            encoder=encoder,
        )

    return stack("decoder", 2, stack("encoder", 1, None))


ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        _plain(
            "gpt_neox",
            "gpt_neox.layers",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            "mlp.act",
            "hidden_act",
            "attention.dense",
        ),
        _plain("gpt2", "transformer.h", "mlp.c_fc", "mlp.c_proj", "mlp.act", "activation_function", "attn.c_proj"),
        Architecture(
            "opt",
            "model.decoder.layers",
            "fc1",
            "fc2",
            "activation_fn",
            "activation_function",
            "layer_norm",
            "self_attn.out_proj",
            bias="enable_bias",
        ),
        _plain("phi", "model.layers", "mlp.fc1", "mlp.fc2", "mlp.activation_fn", "hidden_act", "self_attn.dense"),
        _plain("gptj", "transformer.h", "mlp.fc_in", "mlp.fc_out", "mlp.act", "activation_function", "attn.out_proj"),
        _plain(
            "bloom",
            "transformer.h",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            "mlp.gelu_impl",
            "hidden_act",
            "self_attention.dense",
        ),
        Architecture(
            "arcee",
            "model.layers",
            "mlp.up_proj",
            "mlp.down_proj",
            "mlp.act_fn",
            "hidden_act",
            "rms_norm",
            "self_attn.o_proj",
            bias="mlp_bias",
        ),
        _gated("llama", bias="mlp_bias"),
        _gated("mistral"),
        _gated("qwen2"),
        _gated("gemma"),
        _gated("gemma2", key="hidden_activation", norms_outputs=True),
        _gated("gemma3_text", key="hidden_activation", norms_outputs=True),
        _t5(gated=False),
        _t5(gated=True),
    )
}
"""Every architecture that isotone knows, by ``model_type``."""


def row_name(model_type: str, feed_forward_proj: str | None) -> str:
    """Return the name of the table's row for what config.json says under two keys; T5 has the second."""
    return "t5_gated" if model_type == "t5" and (feed_forward_proj or "").startswith("gated-") else model_type


def architecture_of(model_type: str) -> Architecture:
    """Return the table's row of a name (a ``model_type``, but see ``row_name``).

    Raises:
        UsageError: the architecture is not in the table; lists those that are.
    """
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"model.source: architecture {model_type!r} is not known; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def projections_of(architecture: Architecture, scope: str) -> tuple[str, ...]:
    """Return the block-relative paths of the projections that a scope constrains.

    Raises:
        UsageError: the scope matches nothing in this architecture; lists those that do.
    """
    if scope not in architecture.scopes:
        kind = "a gated" if architecture.gated else "an ungated"
        raise UsageError(
            f"constraint.scope: {scope!r} matches nothing in {architecture.model_type} ({kind} feed-forward network); "
            f"allowed: {', '.join(architecture.scopes)}"
        )
    return architecture.scopes[scope]
