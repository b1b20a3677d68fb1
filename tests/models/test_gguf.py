"""A GGUF file is a source like any other: the same weights, a tokenizer, and nothing in the log but isotone's lines."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_models import VOCABULARY, logits, tiny_model
from transformers import PreTrainedModel

from isotone.models import describe, load_model, load_tokenizer

LAYERS, HEADS, GROUPS = 2, 4, 2


def tiny_llama() -> PreTrainedModel:
    model: PreTrainedModel = tiny_model(
        "llama", num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=4
    )
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a tiny Llama as llama.cpp would, unquantized."""
    model, path = tiny_llama(), tmp_path / "tiny.gguf"
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    letters = [chr(ord("a") + i) for i in range(26)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab", *(f"<{i}>" for i in range(27, VOCABULARY))])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
        writer.add_tensor(found, (weight if heads is None else interleaved(weight, heads)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight_mn: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a query or key matrix with each head's rotary pairs side by side, as llama.cpp has it."""
    halves = weight_mn.reshape(heads, 2, -1, weight_mn.shape[1])
    return halves.transpose(1, 2).reshape(weight_mn.shape).contiguous()


def test_a_gguf_file_is_the_model_that_was_written(path: Path) -> None:
    loaded, original = load_model(str(path)), tiny_llama()
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(original))
    assert describe(str(path)).model_type == "llama"
    assert load_tokenizer(str(path))("cab")["input_ids"][-2:] == [2, 26]


def test_loading_a_gguf_file_draws_no_bars_into_a_log(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc cab bac " * 8)
    asked = [sys.executable, "-m", "isotone", "evaluate", str(path), "--documents", str(tmp_path / "text.txt")]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "it/s" not in ended.stderr
    assert "\r" not in ended.stderr


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(Exception, match=r"model\.source: .*model\.gguf") as caught:
        load_model(str(tmp_path / "model.gguf"))
    assert "\n" not in str(caught.value)
