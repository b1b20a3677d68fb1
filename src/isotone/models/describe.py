"""What can be said about a model from its configuration alone, without torch: sizes for plans and checks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Model
from isotone.constraint.architectures import ARCHITECTURES, architecture_of, row_name
from isotone.constraint.recipes import ModelKind, kind_of_model
from isotone.errors import UsageError
from isotone.models.sources import Source, one_line, resolve_source


@dataclass(frozen=True)
class ModelDescription:
    """Sizes of a model, read from config.json or a GGUF header."""

    model_type: str
    num_parameters: int
    """Estimated from the sizes; within a few per mille (biases and norms are left out)."""
    vocab_size: int
    context: int | None
    """Longest sequence in tokens; None where positions are unlimited."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Blocks; of an encoder-decoder, those of both."""
    num_heads: int
    tied_embeddings: bool
    activation: str | None
    encoder_decoder: bool = False
    """Whether it reads a source and writes a target."""


def describe(source: str, *, revision: str | None = None, gguf_file: str | None = None) -> ModelDescription:
    """Return the sizes of a model. Of a hub model only config.json is fetched (or taken from the cache).

    Raises:
        UsageError: missing, unreadable, or without the sizes that every language model has.
    """
    at = resolve_source(source, gguf_file)
    if at.gguf_file is not None:
        if not at.local:
            raise UsageError(f"model.gguf_file: fetch {at.given} first (`hf download {at.given} {at.gguf_file}`)")
        return _from_gguf(at)
    path = Path(at.location) / "config.json" if at.local else _fetch_config(at, revision)
    try:
        config = records.read_json(path)
    except records.CorruptError as error:
        raise UsageError(f"model.source: config.json of {at.given} cannot be read ({error.__cause__})") from error
    return _from_config(at, config.get("text_config", config))


def kind_of(model: Model) -> ModelKind:
    """Return what the meaning of a recipe depends on, of an experiment's model.

    Raises:
        UsageError: the model cannot be read, or its architecture is unknown.
    """
    found = describe(model.source, revision=model.revision, gguf_file=model.gguf_file)
    return kind_of_model(architecture_of(found.model_type), found.hidden_size)


def _fetch_config(at: Source, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with one_line(at, "configuration"):
        return Path(hf_hub_download(at.location, "config.json", revision=revision))


def _from_config(at: Source, config: dict[str, Any]) -> ModelDescription:
    def size(*keys: str) -> int:
        for key in keys:
            if isinstance(config.get(key), int):
                return config[key]
        raise UsageError(f"model.source: config.json of {at.given} has no {keys[0]}")

    def optional(*keys: str) -> int | None:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), None)

    model_type = str(config.get("model_type"))
    if model_type == "t5":
        return _from_t5(config, size)
    hidden, layers = size("hidden_size", "n_embd", "n_embed"), size("num_hidden_layers", "n_layer")
    intermediate = optional("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    heads, vocabulary = size("num_attention_heads", "n_head"), size("vocab_size")
    tied = bool(config.get("tie_word_embeddings", model_type not in _UNTIED))
    context = optional("max_position_embeddings", "n_positions")
    gated = model_type in ARCHITECTURES and ARCHITECTURES[model_type].gated
    key_heads = optional("num_key_value_heads") or heads
    head = optional("head_dim") or hidden // heads
    embedding = optional("word_embed_proj_dim") or hidden
    parameters = (
        vocabulary * embedding * (1 if tied else 2)
        + (2 * embedding * hidden if embedding != hidden else 0)
        + layers * head * hidden * (2 * heads + 2 * key_heads)
        + layers * hidden * intermediate * (3 if gated else 2)
        + (hidden * (context or 0) if model_type in _LEARNED_POSITIONS else 0)
    )
    activation = next(
        (config[k] for k in ("hidden_activation", "hidden_act", "activation_function") if config.get(k)), None
    )
    return ModelDescription(
        model_type, parameters, vocabulary, context, hidden, intermediate, layers, heads, tied, activation
    )


def _from_t5(config: dict[str, Any], size: Callable[..., int]) -> ModelDescription:
    """Return the sizes of a T5, whose positions are relative and unlimited."""
    hidden, inner, vocabulary = size("d_model"), size("num_heads") * size("d_kv"), size("vocab_size")
    projection = str(config.get("feed_forward_proj", "relu"))
    encoder = size("num_layers")
    decoder = config.get("num_decoder_layers") or encoder
    network = hidden * size("d_ff") * (3 if ARCHITECTURES[row_name("t5", projection)].gated else 2)
    tied = bool(config.get("tie_word_embeddings", True))
    return ModelDescription(
        "t5",
        vocabulary * hidden * (1 if tied else 2)
        + 2 * size("num_heads") * int(config.get("relative_attention_num_buckets", 32))
        + encoder * (4 * hidden * inner + network)
        # a decoder block has a second attention, to the encoder
        + decoder * (8 * hidden * inner + network),
        vocabulary,
        None,
        hidden,
        size("d_ff"),
        encoder + decoder,
        size("num_heads"),
        tied,
        projection,
        encoder_decoder=True,
    )


def _from_gguf(at: Source) -> ModelDescription:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(f"model.source: {at.given} needs the gguf package; install isotone[gguf]") from error
    try:
        reader = GGUFReader(Path(at.location) / str(at.gguf_file))
    except (ValueError, IndexError, KeyError) as error:
        raise UsageError(f"model.source: {at.given} is not a readable GGUF file ({error})") from error

    def field(key: str) -> Any:
        if key not in reader.fields:
            raise UsageError(f"model.source: the GGUF file {at.given} has no {key}")
        return reader.fields[key].contents()

    kind = field("general.architecture")
    return ModelDescription(
        kind,
        sum(int(tensor.n_elements) for tensor in reader.tensors),
        len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0,
        int(field(f"{kind}.context_length")),
        int(field(f"{kind}.embedding_length")),
        int(field(f"{kind}.feed_forward_length")),
        int(field(f"{kind}.block_count")),
        int(field(f"{kind}.attention.head_count")),
        "output.weight" not in {tensor.name for tensor in reader.tensors},
        None,
    )


_UNTIED = {"gpt_neox", "gptj", "phi", "llama", "mistral", "arcee", "qwen2"}
"""Architectures whose configuration leaves ``tie_word_embeddings`` out when the head is not tied."""
_LEARNED_POSITIONS = {"gpt2", "opt"}
