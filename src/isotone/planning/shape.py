"""The sizes of a model that decide what it costs, from its configuration alone: exact, and without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Model
from isotone.constraint.architectures import ARCHITECTURES, row_name
from isotone.constraint.layers import Layers, resolve_layers
from isotone.constraint.recipes import ModelKind, kind_of_model
from isotone.errors import UsageError
from isotone.models.sources import Source, resolve_source

_TABLE = resources.files("isotone") / "planning" / "shapes.json"
_ROTARY = {"gpt_neox", "gptj", "phi"}
_ONE_NORM = {"gptj", "phi"}
_TIED = {"gpt2", "opt", "bloom", "gemma", "gemma2", "gemma3_text", "t5"}
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model, causal or encoder-decoder.

    Attributes:
        source: as the experiment names it.
        model_type: as in config.json.
        config: the keys of config.json that give the sizes.
        vocabulary: rows of the embedding.
        context: longest sequence, in tokens.
        hidden: width of the residual stream.
        layers: blocks; of an encoder-decoder, of both sides.
        heads: attention heads.
        query: heads × size of a head.
        key: key heads × size of a head.
        intermediate: width of the feed-forward network.
        gated: whether that has a gate.
        tied: whether the head is the embedding.
        stored_bytes: bytes of the weights' files.
        origin: where the sizes come from.
        encoder_layers: how many of the blocks are an encoder's; 0 where the model is causal.
    """

    source: str
    model_type: str
    config: Mapping[str, Any]
    vocabulary: int
    context: int
    hidden: int
    layers: int
    heads: int
    query: int
    key: int
    intermediate: int
    gated: bool
    tied: bool
    stored_bytes: int
    origin: str
    encoder_layers: int = 0

    @property
    def cross_layers(self) -> int:
        """Blocks that also attend to what an encoder read."""
        return self.layers - self.encoder_layers if self.encoder_layers else 0

    @property
    def layer_norm(self) -> bool:
        """Whether norms have biases (LayerNorm, as opposed to RMSNorm)."""
        return self.model_type in ARCHITECTURES and ARCHITECTURES[self.model_type].norm == "layer_norm"

    @property
    def kind(self) -> ModelKind:
        """What the meaning of a recipe depends on."""
        architecture = ARCHITECTURES.get(self.model_type)
        return kind_of_model(architecture, self.hidden) if architecture else "rms_norm"

    @property
    def rotary_layer_norm(self) -> bool:
        """Whether rotated queries and keys are kept beside the projection that they are cut from."""
        return self.model_type in _ROTARY

    @property
    def parallel(self) -> bool:
        """Whether attention and feed-forward network read the same residual stream."""
        return self.model_type in _ONE_NORM or (
            self.model_type == "gpt_neox" and bool(self.config.get("use_parallel_residual", True))
        )

    @property
    def dropout(self) -> bool:
        """Whether any dropout is on in training."""
        keys = (
            "dropout_rate",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "hidden_dropout",
            "attention_dropout",
            "dropout",
        )
        default = 0.1 if self.model_type in ("gpt2", "opt", "gptj", "t5") else 0.0
        return any((self.config.get(key, default) or 0) > 0 for key in keys if key in self.config or default)

    @property
    def layer_weights(self) -> int:
        """Entries of one block's matrices, less those of a second attention: what its multiplications cost."""
        attention = self.hidden * (2 * self.query + 2 * self.key)
        return attention + self.hidden * self.intermediate * (3 if self.gated else 2)

    @property
    def head_weights(self) -> int:
        """Entries of the head's matrix."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        cross = self.cross_layers * (4 * self.hidden * self.query + self.hidden)
        return self.layers * (self.layer_weights + self._layer_vectors) + cross + self._outside

    def constrained(self, scope: str, layers: Layers | None = None) -> int:
        """Return how many weights a scope constrains in the given blocks; 0 where it has nothing here."""
        up = self.hidden * self.intermediate
        sizes = {
            "mlp_in": up,
            "mlp_both": 2 * up,
            "mlp_in_attn_out": up + self.hidden * self.query,
            "gated_updown": 2 * up,
            "gated_all": 3 * up,
        }
        return len(resolve_layers(layers, self.layers)) * sizes[scope]

    @property
    def _layer_vectors(self) -> int:
        """Norms and biases of a block."""
        kind, config = self.model_type, self.config
        if not self.layer_norm:
            norms = {"gemma2": 4, "gemma3_text": 4}.get(kind, 2) * self.hidden
            if kind == "gemma3_text":
                norms += 2 * self.query // self.heads
            biases = self.query + 2 * self.key if kind == "qwen2" else 0
            if config.get("attention_bias") and kind != "qwen2":
                biases += self.query + 2 * self.key + self.hidden
            if config.get("mlp_bias"):
                biases += self.intermediate * (2 if self.gated else 1) + self.hidden
            return norms + biases
        norms = 2 * self.hidden * (1 if kind in _ONE_NORM else 2)
        attention = self.query + 2 * self.key + self.hidden
        if kind == "gptj" or config.get("attention_bias") is False or config.get("enable_bias") is False:
            attention = 0
        network = 0 if config.get("enable_bias") is False else self.intermediate + self.hidden
        return norms + attention + network

    @property
    def _outside(self) -> int:
        """Parameters outside the blocks: embeddings, head, last norm."""
        kind, width = self.model_type, int(self.config.get("word_embed_proj_dim") or self.hidden)
        embeddings = self.vocabulary * width * (1 if self.tied else 2)
        if width != self.hidden:
            embeddings += 2 * width * self.hidden
        positions = {"gpt2": self.context, "opt": self.context + 2}.get(kind, 0) * self.hidden
        norm = self.hidden * (2 if self.layer_norm else 1)
        if self.encoder_layers:  # two stacks, each with its norm and its table of relative positions
            return embeddings + 2 * norm + 2 * self.heads * int(self.config.get("relative_attention_num_buckets", 32))
        if kind == "opt" and self.config.get("do_layer_norm_before") is False:
            norm = 0
        if kind == "bloom":
            norm *= 2  # one after the embedding, too
        return embeddings + positions + norm + (self.vocabulary if kind in ("phi", "gptj") else 0)


def read_shape(model: Model) -> ModelShape:
    """Return the sizes of an experiment's model: from its folder or file, the hub's local cache, or the shipped table.

    Raises:
        UsageError: nothing here says what the sizes are; says what to do.
    """
    at = resolve_source(model.source, model.gguf_file)
    if at.gguf_file is not None:
        return _from_gguf(at)
    if at.local:
        folder = Path(at.location)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return shape_of(at.given, _read(folder / "config.json"), "its config.json", weights)
    if (cached := _cached(at.location, model.revision)) is not None:
        return shape_of(at.given, _read(cached), "config.json in the hub's cache")
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    if at.given in table:
        return shape_of(at.given, table[at.given], "the table that comes with isotone")
    raise UsageError(
        f"model.source: the sizes of {at.given} are not known here; fetch its configuration (`hf download {at.given} "
        f"config.json`), or give a folder that holds it. Known without: {', '.join(sorted(table))}"
    )


def shape_of(source: str, config: Mapping[str, Any], origin: str, stored_bytes: int = 0) -> ModelShape:
    """Return the sizes that a config.json states.

    Args:
        source: how the experiment names the model.
        config: contents of config.json.
        origin: where it was found.
        stored_bytes: size of the weights' files; taken from the number of parameters and their type where 0.

    Raises:
        UsageError: a size is missing.
    """
    config = config.get("text_config", config)

    def size(*keys: str, default: int | None = None) -> int:
        found = next((config[key] for key in keys if isinstance(config.get(key), int)), default)
        if found is None:
            raise UsageError(f"model.source: config.json of {source} has no {keys[0]}")
        return int(found)

    kind = str(config.get("model_type"))
    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "num_heads")
    head = size("head_dim", "d_kv", default=hidden // heads)
    layers = size("num_hidden_layers", "n_layer", "num_layers")
    decoder = size("num_decoder_layers", default=layers) if kind == "t5" else 0
    row = row_name(kind, config.get("feed_forward_proj"))
    shape = ModelShape(
        source=source,
        model_type=kind,
        config=dict(config),
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings", "n_positions", "seq_length", default=2048),
        hidden=hidden,
        layers=layers + decoder,
        heads=heads,
        query=heads * head,
        key=head * size("num_key_value_heads", default=heads),
        intermediate=size("intermediate_size", "ffn_dim", "n_inner", "d_ff", default=4 * hidden),
        gated=row in ARCHITECTURES and ARCHITECTURES[row].gated,
        tied=bool(config.get("tie_word_embeddings", kind in _TIED)),
        stored_bytes=stored_bytes,
        origin=origin,
        encoder_layers=layers if decoder else 0,
    )
    width = _BYTES.get(str(config.get("dtype", config.get("torch_dtype"))), 2.0)
    return shape if stored_bytes else _with_bytes(shape, int(shape.num_parameters * width))


def _with_bytes(shape: ModelShape, stored_bytes: int) -> ModelShape:
    return ModelShape(**{**shape.__dict__, "stored_bytes": stored_bytes})


def _read(path: Path) -> dict[str, Any]:
    try:
        return records.read_json(path)
    except records.CorruptError as error:
        raise UsageError(f"model.source: {path} cannot be read ({error.__cause__})") from error


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _from_gguf(at: Source) -> ModelShape:
    """Read a GGUF header; its architecture's names are those of transformers for the ones that isotone knows."""
    if not at.local:
        raise UsageError(f"model.gguf_file: fetch {at.given} first (`hf download {at.given} {at.gguf_file}`)")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(f"model.source: {at.given} needs the gguf package; install isotone[gguf]") from error
    path = Path(at.location) / str(at.gguf_file)
    try:
        reader = GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
        keys = {
            "hidden_size": "embedding_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "intermediate_size": "feed_forward_length",
            "max_position_embeddings": "context_length",
        }
        fields = {key: reader.fields.get(f"{kind}.{name}") for key, name in keys.items()}
        config = {key: int(field.contents()) for key, field in fields.items() if field is not None}
        config["vocab_size"] = len(reader.fields["tokenizer.ggml.tokens"].data)
        tied = "output.weight" not in {tensor.name for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise UsageError(f"model.source: {at.given} is not a readable GGUF file ({error})") from error
    whole = {"model_type": kind, **config, "tie_word_embeddings": tied}
    return shape_of(at.given, whole, "its GGUF header", path.stat().st_size)
