"""An experiment file means what it says; a fault is told in one line with file, key, finding and what is allowed."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isotone.config import Experiment
from isotone.config_io import dump_yaml, experiment_from_dict, json_schema, load_experiment, resolve_seed
from isotone.errors import UsageError


def _file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _fault(source: str | Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_experiment(source, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_file_is_read_and_named_by_its_stem(tmp_path: Path) -> None:
    experiment = load_experiment(_file(tmp_path, "training: {lr: 1e-4, epochs: .5}\nseeds: [3, 4]"))
    assert (experiment.name, experiment.training.lr, experiment.training.epochs) == ("mine", 1e-4, 0.5)
    assert experiment.seeds == (3, 4)


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    assert load_experiment(_file(tmp_path, "description: no")).description == "no"


def test_overrides_replace_single_values_and_reach_new_arms() -> None:
    experiment = load_experiment(
        "pocket",
        ["training.lr=1e-3", "arms.extra.start=baseline", "arms.monotonic.training.warmup=0.3", "seeds=[7,8]"],
    )
    assert experiment.training.lr == 1e-3
    assert experiment.arms["extra"].start == "baseline"
    assert experiment.training_of("monotonic").warmup == 0.3
    assert experiment.seeds == (7, 8)
    assert load_experiment("pocket").seeds == (42,)


@pytest.mark.parametrize("defaults", [False, True])
@pytest.mark.parametrize("preset", ["pocket", "pythia-1.4b", "pythia-1.4b-later"])
def test_what_is_dumped_is_read_back_equal(preset: str, defaults: bool, tmp_path: Path) -> None:
    experiment = load_experiment(preset, ["model.revision='1e5'", "training.eps=1e-12"])
    assert load_experiment(_file(tmp_path, dump_yaml(experiment, defaults))) == experiment


@given(st.text(st.characters(codec="utf-8"), max_size=20))
@example("a\x85b\u2028c\u2029 d\ufeff")
def test_any_text_survives_dump_and_load(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(dump_yaml(Experiment(name="x", description=text)), newline="")
    assert load_experiment(path).description == text


def test_the_json_schema_is_closed_and_describes_its_keys() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert "learning rate" in schema["$defs"]["Training"]["properties"]["lr"]["description"]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainng: {lr: 1}", "trainng: unknown key; did you mean training?"),
        ("training: {warmpu: 1}", "training.warmpu: unknown key; did you mean training.warmup?"),
        ("lr: 1e-4", "lr: unknown key; did you mean training.lr?"),
        ("model: {zzzzqqqq: 1}", "model.zzzzqqqq: unknown key; allowed: source, revision"),
        ("training: {micro_batch: true}", "training.micro_batch: found true, allowed: a whole number"),
        ("training: {micro_batch: '8'}", 'training.micro_batch: found "8", allowed: a whole number'),
        ("training: {micro_batch: 1.5}", "training.micro_batch: found 1.5, allowed: a whole number"),
        ("training: {micro_batch: 0}", "training.micro_batch: found 0, allowed: greater than or equal to 1"),
        ("training: {lr: fast}", 'training.lr: found "fast", allowed: a number'),
        ("training: {schedule: cosin}", "allowed: 'cosine' or 'linear'; did you mean cosine?"),
        ("model: {revision: 1234}", "model.revision: found 1234, allowed: text (in quotes)"),
        ("model: pocket", 'model: found "pocket", allowed: keys and values'),
        ("seeds: []", "seeds: found [], allowed: at least 1 of them"),
        ("arms: {baseline: {}, a: {start: b}}", "arms.a.start: there is no arm 'b'"),
        ("arms: {baseline: {}, a: {constraint: {}}}", "arms.a.constraint: give either recipe"),
        ("data: {fractions: {train: 1}}", "data.fractions: expected exactly train"),
        (
            "arms: {baseline: {}, a: {matched_loss: {to: a, by: heat}}}",
            'arms.a.matched_loss.by: found "heat", allowed: \'temp',
        ),
        ("arms: {baseline: {}, a: {matched_loss: {by: noise}}}", "arms.a.matched_loss.to: missing"),
        ("arms: {baseline: {}, a: {training: {random_prefix: 2}}}", "random_prefix: found 2, allowed: less than or"),
        (
            "arms: {baseline: {}, a: {train: false, matched_loss: {to: b, by: noise}}}",
            "arms.a.matched_loss.to: found 'b', allowed: baseline",
        ),
        ("name: x\nname: y", "line 2: not valid YAML: name is given twice"),
        ("a: [", "line 1: not valid YAML"),
        ("1: 2", "line 1: not valid YAML: key 1 is not text"),
        ("- 1", "expected keys and values, found [1]"),
        ("", "expected keys and values, found null"),
        ("a: !!python/object/apply:os.getpid []", "not valid YAML: could not determine a constructor"),
        ("name: ../x", "name: found"),
        ("arms: &a {b: *a}", "something in it contains itself"),
    ],
)
def test_a_fault_is_told_in_one_line_that_begins_with_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path, text)
    fault = _fault(path)
    assert fault.startswith(str(path))
    assert message in fault
    assert "\n" not in fault


def test_every_fault_gets_its_line(tmp_path: Path) -> None:
    fault = _fault(_file(tmp_path, "training: {lr: x, epoch: 1}\nseeds: 3"))
    assert [line.split(": ")[1] for line in fault.splitlines()] == ["training.lr", "training.epoch", "seeds"]


def test_a_fault_of_an_override_names_the_command_line() -> None:
    assert _fault("pocket", "training.lr=x") == '--set: training.lr: found "x", allowed: a number'
    assert _fault("pocket", "training.lr").startswith("--set training.lr: expected key=value")
    assert "training.lr is a single value" in _fault("pocket", "training.lr.x=1")


def test_an_unknown_preset_is_answered_with_the_nearest_or_all() -> None:
    assert _fault("pokcet") == "there is no preset 'pokcet'; did you mean pocket?"
    assert "presets: pocket, pocket-arcee, pocket-controls, pocket-gated, pocket-quick, pocket-t5" in _fault("qqqq")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in _fault(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    assert "not UTF-8 at byte 9" in _fault(tmp_path / "latin.yaml")


def test_a_resolved_configuration_that_was_changed_by_hand_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^config\.yaml: nmae: unknown key"):
        experiment_from_dict({"name": "x", "nmae": 1}, "config.yaml")


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_is_the_one_given_then_the_environments_then_the_first() -> None:
    experiment = Experiment(name="x", seeds=(5, 6))
    assert resolve_seed(experiment, 1, {"EXPERIMENT_SEED": "2"}) == 1
    assert resolve_seed(experiment, None, {"EXPERIMENT_SEED": "2"}) == 2
    assert resolve_seed(experiment, None, {"EXPERIMENT_SEED": ""}) == 5
    assert resolve_seed(experiment, None, {}) == 5


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "9223372036854775808", "1e3"])
def test_a_seed_that_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="EXPERIMENT_SEED: found"):
        resolve_seed(Experiment(name="x"), None, {"EXPERIMENT_SEED": text})
    with pytest.raises(UsageError, match="--seed: found"):
        resolve_seed(Experiment(name="x"), -1, {})
