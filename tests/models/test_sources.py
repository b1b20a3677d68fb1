import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils.logging import get_logger
from tiny_models import MODELS, logits, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from isotone import records
from isotone.config import Model
from isotone.constraint import constrain, fold
from isotone.errors import IsotoneError, UsageError
from isotone.models import describe, load_model, load_tokenizer, pin_model, save_model
from isotone.models.sources import Source, one_line


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model("gpt_neox"), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def refusal(source: str, **arguments: Any) -> str:
    """Return the message of the refusal, and check that it is one line."""
    with pytest.raises(UsageError) as caught:
        load_model(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.source: ")
    return message


@pytest.mark.parametrize("name", MODELS)
def test_exported_model_reloads_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    save_model(model, None, tmp_path / "model")
    reloaded = load_model(str(tmp_path / "model"))
    assert not reloaded.training
    assert reloaded.config.use_cache is False
    assert all(torch.equal(reloaded.state_dict()[k], v) for k, v in model.state_dict().items())
    assert torch.equal(logits(reloaded), logits(model))
    assert json.loads((tmp_path / "model" / "config.json").read_text()).get("use_cache", True) is True


def test_exported_folder_is_plain_transformers(folder: Path) -> None:
    """Loads without isotone's code, keeps its tokenizer, and its hashes are in a manifest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(logits(model), logits(tiny_model("gpt_neox")))
    assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
    assert load_tokenizer(str(folder))("w5 w7")["input_ids"] == [5, 7]
    records.verify_directory(folder)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_export_refuses_a_constrained_model_and_an_existing_folder(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    with pytest.raises(UsageError, match="is there already"):
        save_model(model, None, folder)
    constrain(model)
    with pytest.raises(UsageError, match="fold it first"):
        save_model(model, None, tmp_path / "other")
    save_model(fold(model), None, tmp_path / "other")


def test_export_that_does_not_reload_equal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = records.tensors_to_bytes

    def damaged(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        return written({k: v + 1e-3 if k.endswith("embed_in.weight") else v for k, v in tensors.items()}, metadata)

    monkeypatch.setattr(records, "tensors_to_bytes", damaged)
    with pytest.raises(IsotoneError, match=r"embed_in\.weight is not the same"):
        save_model(tiny_model("gpt_neox"), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_export_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".model.unchecked").mkdir()
    save_model(tiny_model("gpt_neox"), None, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_missing_folder_and_folder_without_model_are_named(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal(str(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file" in refusal(str(tmp_path / "notes.txt"))
    assert "there is no file" in refusal(str(tmp_path / "model.gguf"))


def test_unreadable_weights_and_configuration_are_one_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert "cannot be read" in refusal(str(folder))
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refusal(str(folder))
    with pytest.raises(UsageError, match=r"config\.json of .* cannot be read"):
        describe(str(folder))


def test_weights_of_another_size_than_the_configuration_says_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] // 2}))
    message = refusal(str(folder))
    assert "does not fit its own configuration: gpt_neox.layers.0.mlp.dense_4h_to_h.weight is [" in message


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(str(folder))


def test_pickles_are_refused_unless_asked_for_by_name(folder: Path) -> None:
    state = tiny_model("gpt_neox").state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "model.allow_pickle: true" in refusal(str(folder))
    loaded = load_model(str(folder), allow_pickle=True)
    assert torch.equal(logits(loaded), logits(tiny_model("gpt_neox")))


def test_remote_code_is_refused_and_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    assert "model.trust_remote_code: true" in refusal(str(folder))


def test_unknown_architecture_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nonesuch"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "of an architecture that transformers does not know" in refusal(str(folder))


def test_model_with_missing_weights_is_refused_not_randomized(folder: Path) -> None:
    """transformers fills them with random numbers and prints a report."""
    tensors = records.tensors_from_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    tensors[name.replace(".weight", ".parametrizations.weight.original")] = tensors.pop(name)
    records.write_bytes(folder / "model.safetensors", records.tensors_to_bytes(tensors, {"format": "pt"}))
    message = refusal(str(folder))
    assert f"lacks {name}" in message
    assert "before its constraint was folded" in message


def test_hub_that_cannot_be_reached_says_what_to_do() -> None:
    """The suite runs with HF_HUB_OFFLINE=1."""
    message = refusal("EleutherAI/pythia-14m-not-cached")
    assert "hf download EleutherAI/pythia-14m-not-cached" in message
    with pytest.raises(UsageError, match=r"could not be fetched from the hub.*hf download"):
        describe("EleutherAI/pythia-14m-not-cached")
    with pytest.raises(UsageError, match=r"could not be fetched from the hub.*hf download"):
        pin_model(Model(source="EleutherAI/pythia-14m-not-cached"))
    with pytest.raises(UsageError, match=r"tokenizer could not be fetched.*hf download"):
        load_tokenizer("EleutherAI/pythia-14m-not-cached")


def test_an_unreachable_hub_is_told_once() -> None:
    """The hub's client warns of every retry; the error that follows says it all."""
    client = get_logger("huggingface_hub.utils._http")
    with one_line(Source("some/model", "some/model", None, False)):
        assert not client.isEnabledFor(logging.WARNING)
    assert client.isEnabledFor(logging.WARNING)


def test_kernel_that_an_architecture_lacks_is_one_line(tmp_path: Path) -> None:
    save_model(tiny_model("bloom"), None, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).config.model_type == "bloom"
    assert "model.attention: eager" in refusal(str(tmp_path / "model"), attention="sdpa")


def test_dropout_can_be_turned_off_at_loading(tmp_path: Path) -> None:
    save_model(tiny_model("gpt2", resid_pdrop=0.1), None, tmp_path / "model")
    for dropout, expected in ((None, 0.1), (0.0, 0.0)):
        model: Any = load_model(str(tmp_path / "model"), dropout=dropout)
        assert model.transformer.h[0].mlp.dropout.p == expected


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(folder))
    assert capfd.readouterr() == ("", "")


def test_dtype_is_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    save_model(tiny_model("gpt_neox").bfloat16(), None, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).dtype == torch.float32
    assert load_model(str(tmp_path / "model"), dtype="auto").dtype == torch.bfloat16


def test_a_model_without_weights_or_tokenizer_is_refused_before_the_corpus_is_packed(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer up, to which every corpus is empty."""
    bare = tmp_path / "bare"
    save_model(tiny_model("gpt_neox"), None, bare)
    with pytest.raises(UsageError, match="bare comes without a tokenizer"):
        load_tokenizer(str(bare))
    (bare / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="bare holds no weights"):
        pin_model(Model(source=str(bare)))


def test_every_file_of_a_tokenizer_is_pinned(folder: Path) -> None:
    (folder / "merges.txt").write_text("a b\n")
    model = Model(source=str(folder))
    pin = pin_model(model)
    (folder / "merges.txt").write_text("b a\n")
    with pytest.raises(UsageError, match=r"merges\.txt of .* is not the file that setup pinned"):
        load_tokenizer(model, pin=pin)


def test_pinned_model_is_loaded_and_a_changed_one_is_refused(folder: Path, tmp_path: Path) -> None:
    model = Model(source=str(folder))
    pin = pin_model(model)
    assert set(pin["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert (pin["model_type"], pin["vocab_size"], pin["context"]) == ("gpt_neox", 64, 64)
    assert torch.equal(logits(load_model(model, pin=pin)), logits(tiny_model("gpt_neox")))
    assert load_tokenizer(model, pin=pin)("w9")["input_ids"] == [9]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert {k: v for k, v in pin_model(Model(source=str(moved))).items() if k != "source"} == {
        k: v for k, v in pin.items() if k != "source"
    }
    tensors = records.tensors_from_file(folder / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"] += 1
    records.write_bytes(folder / "model.safetensors", records.tensors_to_bytes(tensors, {"format": "pt"}))
    with pytest.raises(UsageError, match=r"model\.safetensors of .* is not the file that setup pinned"):
        load_model(model, pin=pin)


def test_pocket_model_is_found_or_its_absence_is_explained() -> None:
    from isotone.models.sources import BUNDLED

    if (BUNDLED["pocket"] / "config.json").is_file():
        assert describe("pocket").model_type == "gpt_neox"
    else:
        assert "bundled model is missing" in refusal("pocket")
