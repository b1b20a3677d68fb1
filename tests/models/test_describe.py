import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import MODELS, VOCABULARY, tiny_model

from isotone.errors import UsageError
from isotone.models import describe, load_model, save_model


@pytest.mark.parametrize("name", MODELS)
def test_description_agrees_with_the_loaded_model(name: str, tmp_path: Path) -> None:
    """Sizes exactly, the number of parameters within what biases and norms add to matrices of this size."""
    model = tiny_model(name)
    save_model(model, None, tmp_path / "model")
    found = describe(str(tmp_path / "model"))
    assert found.model_type == model.config.model_type
    blocks = model.config.num_hidden_layers + (getattr(model.config, "num_decoder_layers", None) or 0)
    assert (found.vocab_size, found.hidden_size, found.num_layers, found.num_heads) == (VOCABULARY, 16, blocks, 2)
    assert found.encoder_decoder == model.config.is_encoder_decoder
    assert found.intermediate_size == model.config.to_dict().get("intermediate_size", found.intermediate_size)
    assert found.tied_embeddings == bool(model.all_tied_weights_keys)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert found.num_parameters == pytest.approx(matrices, rel=0.01)


def test_describe_needs_no_torch(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), None, tmp_path / "model")
    code = "import sys; from isotone.models import describe; describe(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False).returncode == 0


def test_configuration_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": 16}')
    with pytest.raises(UsageError, match=r"config\.json of .* has no num_hidden_layers"):
        describe(str(tmp_path))


def write_gguf(path: Path) -> None:
    """Write a Llama of random weights as GGUF, the way llama.cpp's converter names its tensors."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(64)])
    writer.add_token_merges(["w 0"])
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32,) for n in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.02, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_described_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    found = describe(str(path))
    assert (found.model_type, found.hidden_size, found.context, found.num_layers) == ("llama", 32, 64, 1)
    model = load_model(str(path))
    assert model.config.model_type == "llama"
    assert found.num_parameters == sum(p.numel() for p in model.parameters())


def test_unreadable_gguf_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a model")
    for refuse in (load_model, describe):
        with pytest.raises(UsageError) as caught:
            refuse(str(path))  # type: ignore[operator]
        assert "\n" not in str(caught.value)
