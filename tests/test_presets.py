"""Every preset is valid offline and carries the numbers of the experiment that it names."""

from pathlib import Path

import pytest

from isotone.config_io import list_presets, load_experiment

NAMES = [preset.name for preset in list_presets()]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_under_its_own_name_and_says_what_it_is(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.description.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_context_holds_the_attacked_window(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.data.pairs or experiment.attacks.protocol.length <= experiment.data.sequence_length


def test_the_models_that_are_promised_have_presets() -> None:
    pythia = {f"pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b")}
    llama = {"llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"}
    others = {
        "pocket",
        "pocket-quick",
        "t5-small",
        "t5-base",
        "t5-large",
        "gpt2",
        "qwen2.5-1.5b",
        "qwen2.5-7b",
        "smollm2-135m",
    }
    assert pythia | llama | others <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("pocket")])
def test_the_effective_batch_of_every_published_recipe_is_32_and_of_t5_4(name: str) -> None:
    training = load_experiment(name).training
    assert training.micro_batch * training.accumulation == (4 if name.startswith("t5-") else 32)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_summarization_track_has_its_numbers(size: str) -> None:
    x = load_experiment(f"t5-{size}")
    baseline, monotonic = x.training_of("baseline"), x.training_of("monotonic")
    assert (baseline.epochs, baseline.lr, baseline.warmup, monotonic.warmup) == (7, 5e-5, 0.10, 0.15)
    assert (x.data.source_length, x.data.target_length, x.model.source) == (512, 128, f"google-t5/t5-{size}")
    assert (baseline.precision, monotonic.precision) == ("fp32", "fp32")
    uses = {use: [part.source.split("/")[1] for part in x.data.sources if part.use == use] for use in ("train", "test")}
    assert uses == {
        "train": ["dialogsum", "highlightsum", "arxiv-summarization"],
        "test": ["cnn_dailymail", "xsum", "samsum"],
    }
    rouge = x.evaluation.rouge
    assert rouge is not None
    assert (rouge.beams, rouge.length_penalty, rouge.no_repeat_ngram, rouge.resamples) == (4, 1.2, 3, 1000)
    assert (x.attacks.triggers.length, x.attacks.hotflip.flips, x.attacks.hotflip.published_success) == (5, 5, 0.10)
    assert list(x.arms) == ["pretrained_model", "baseline", "monotonic"]
    assert not x.arms["pretrained_model"].train


def test_the_founding_preset_has_the_founding_numbers() -> None:
    x = load_experiment("pythia-1.4b")
    t = x.training
    assert (t.epochs, t.micro_batch, t.accumulation, t.lr) == (1, 8, 4, 1e-5)
    assert (t.weight_decay, t.clip, t.warmup, x.training_of("monotonic").warmup) == (0.01, 1.0, 0.10, 0.15)
    assert (x.data.sequence_length, x.data.source, x.data.num_documents) == (2048, "monology/pile-uncopyrighted", None)
    triggers, hotflip = x.attacks.triggers, x.attacks.hotflip
    assert (triggers.length, triggers.candidates, triggers.iterations, triggers.restarts) == (10, 100, 100, 5)
    assert (hotflip.flips, x.attacks.num_documents, hotflip.published_success) == (10, 200, 0.15)
    assert x.seeds == (42, 1337, 2024, 8888, 12345)


def test_the_later_published_run_has_its_numbers() -> None:
    x = load_experiment("pythia-1.4b-later")
    baseline, monotonic = x.training_of("baseline"), x.training_of("monotonic")
    assert (baseline.epochs, baseline.lr, baseline.warmup) == (5, 1e-5, 0.10)
    assert (monotonic.epochs, monotonic.lr, monotonic.warmup) == (10, 5e-5, 0.20)
    assert (x.data.num_documents, x.attacks.num_search_documents, x.attacks.num_documents) == (100_000, 80, 120)
    assert (x.attacks.triggers.restarts, x.attacks.triggers.iterations) == (3, 50)


def test_the_pocket_presets_need_no_network_and_have_the_promised_arms() -> None:
    pocket, quick = load_experiment("pocket"), load_experiment("pocket-quick")
    assert list(pocket.arms) == ["baseline", "monotonic", "shifted_twin", "matched"]
    assert list(quick.arms) == ["baseline", "monotonic"]
    twin = pocket.arms["shifted_twin"]
    assert (twin.start, twin.train) == ("baseline", False)
    assert twin.constraint is not None
    assert twin.constraint.initialization == "shift"
    for experiment in (pocket, quick):
        assert (experiment.model.source, experiment.data.source) == ("pocket", "web-bible")
    assert pocket.attacks.num_documents >= 48


def test_the_pocket_t5_needs_no_network_and_has_the_three_arms_and_a_control() -> None:
    x = load_experiment("pocket-t5")
    assert (x.model.source, x.data.source) == ("pocket-t5", "bible-pairs")
    assert list(x.arms) == ["pretrained_model", "baseline", "monotonic", "matched"]
    assert x.arms["matched"].matched_loss is not None
    assert x.evaluation.rouge is not None
    assert (x.evaluation.rouge.beams, x.evaluation.rouge.length_penalty, x.evaluation.rouge.no_repeat_ngram) == (
        4,
        1.2,
        3,
    )
    assert x.attacks.hotflip.published_success == 0.10


def test_the_preset_of_controls_has_every_control() -> None:
    arms = load_experiment("pocket-controls").arms
    matched = {arm.matched_loss.by for arm in arms.values() if arm.matched_loss}
    assert matched == {"temperature", "noise", "undertrained"}
    assert [a.matched_loss.draw for a in arms.values() if a.matched_loss and a.matched_loss.by == "noise"] == [1, 2, 3]
    assert {"shifted_twin", "edit_trained", "reparametrized", "sign_frozen"} <= arms.keys()


def test_preset_files_hold_nothing_but_presets() -> None:
    import isotone

    folder = Path(isotone.__file__).parent / "presets"
    assert {path.suffix for path in folder.iterdir()} == {".yaml"}
