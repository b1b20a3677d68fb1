"""Every recovery recipe as an arm of one line, interrupted and not, to the certificate of what it ended in."""

import json
from pathlib import Path

import pytest

from isotone.constraint import certify
from isotone.models import load_model

from .conftest import isotone, run
from .test_pipeline import differences

pytestmark = pytest.mark.integration
PROJECTED = "parametrization: projection, initialization: relu"
ARMS = {
    "distilled": f"{{constraint: {{{PROJECTED}}}, training: {{distill: {{blocks: 0.4, logits: 0.4}}}}}}",
    "annealed": "{constraint: {anneal: 0.5}}",
    "partly": f'{{constraint: {{{PROJECTED}, layers: "last:1", activation: monotone_gelu}}}}',
    "scratch": f"{{start: random, constraint: {{{PROJECTED}}}, training: {{distill: {{logits: 0.5}}}}}}",
    "scratch_free": "{start: random}",
}
ADDED = [
    "--set", "model.source=pocket-arcee",
    "--set", "data.num_documents=150",
    "--set", "training.epochs=0.01",
    "--set", "training.micro_batch=2",
    "--set", "training.validation_rows=4",
    "--set", "training.accumulation=1",
    "--set", "evaluation.checkpoints=[last]",
    "--set", "evaluation.num_documents=1",
    *(part for name, arm in ARMS.items() for part in ("--set", f"arms.{name}={arm}")),
    "--until", "evaluate",
]  # fmt: skip
RUN = Path("pocket-quick/seed-42")


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recovered")
    done = run(out, *ADDED)
    assert done.returncode == 0, done.stderr
    return out


def evaluated(out: Path, arm: str) -> dict:
    return json.loads((out / RUN / "results" / "by_arm" / f"evaluate.{arm}.json").read_text())


def test_every_recipe_ends_in_weights_that_are_certified(recovered: Path) -> None:
    for arm in ("distilled", "annealed", "partly", "scratch"):
        certificate = evaluated(recovered, arm)["certificate"]
        assert (arm, certificate["verdict"], certificate["weights"]) == (arm, "strict", "nonneg")
    assert evaluated(recovered, "partly")["certificate"]["layers"]
    assert evaluated(recovered, "scratch_free")["certificate"] is None
    started = json.loads((recovered / RUN / "results" / "by_arm" / "constrain.annealed.json").read_text())
    assert (started["anneal"], started["certificate"]) == (0.5, None)  # nothing holds yet


def test_interruptions_change_no_byte_of_any_recipe(recovered: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    while not codes or codes[-1] == 75:
        codes.append(run(tmp_path, *ADDED, "--max-epochs-per-run", "0.014").returncode)
    assert codes[-1] == 0
    assert len(codes) > 4
    assert not differences(recovered, tmp_path)


def test_an_arm_is_exported_certified_and_evaluated_as_a_folder(recovered: Path, tmp_path: Path) -> None:
    done = isotone("export", recovered / RUN, "partly", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    certificate = certify(tmp_path / "x")
    assert (certificate.verdict, certificate.layers) == (
        "strict",
        tuple(evaluated(recovered, "partly")["certificate"]["layers"]),
    )
    assert type(load_model(str(tmp_path / "x")).model.layers[-1].mlp.act_fn).__name__ == "MonotoneGELU"
