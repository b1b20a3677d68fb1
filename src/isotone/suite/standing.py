"""What a folder was begun with: asked for more, it goes on; asked for something else, it is refused and never mixed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.errors import UsageError
from isotone.pipeline.record import different_values
from isotone.suite.documents import Documents
from isotone.suite.request import FURTHER, Request

Json = dict[str, Any]

NAME = "request.json"
_DECIDED = ("device", "threads")


def as_begun(experiment: Experiment, folder: Path) -> Experiment:
    """Return the experiment with the device and threads that a folder was begun with, or those of this machine.

    What is given explicitly stays; ``require_same`` refuses it where it differs.
    """
    from isotone.determinism import resolve_device, resolve_threads

    before = _read(folder).get("runtime", {})
    given = experiment.runtime
    device = before.get("device", "auto") if given.device == "auto" else given.device
    threads = before.get("threads") if given.threads is None else given.threads
    runtime = given.model_copy(update={"device": resolve_device(device), "threads": resolve_threads(threads)})
    return experiment.model_copy(update={"runtime": runtime})


def require_same(folder: Path, request: Request, documents: Documents, seed: int) -> None:
    """Write down what decides the logs of a folder, or check that it is what it was begun with.

    Models and attacks may be added, and left out again: logs of others stay as they are.

    Raises:
        UsageError: a value, a model's files or the documents are others; names the first ones.
    """
    now, before = _deciding(request, documents, seed), _read(folder)
    if not before and (folder / "results").exists():
        raise UsageError(f"{folder} holds results, but no {NAME} that says of what; give another --out")
    for part in ("models", "attacks"):
        now[part] = {**before.get(part, {}), **now[part]}
        before = before and {**before, part: {**now[part], **before[part]}}
    if before and (changes := [f"{key} was {a}, is now {b}" for key, a, b in different_values(before, now)]):
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise UsageError(
            f"{folder} was begun with another request: {changes[0]}{more}; undo the change, or give another --out"
        )
    if now != _read(folder):
        records.write_json(folder / NAME, now)


def _read(folder: Path) -> Json:
    path = folder / NAME
    return records.read_json(path) if path.is_file() else {}


def _deciding(request: Request, documents: Documents, seed: int) -> Json:
    """Return what decides the logs; what is computed from them anew each time, such as the analysis, is not there."""
    experiment = request.experiment
    attacks = experiment.attacks.model_dump(mode="json")
    own = {kind: attacks.pop(kind) for kind in (*FURTHER, "triggers", "probe")}
    attacks["hotflip"].pop("methods")
    attacks.pop("transfer")
    evaluation = experiment.evaluation.model_dump(mode="json", include={"stride", "context", "batch_size"})
    return {
        "schema": 1,
        "seed": seed,
        "documents": {"sha256": documents.identity, **experiment.data.model_dump(include=_fields(experiment))},
        "shuffle_seed": experiment.data.shuffle_seed,
        "own_search_documents": request.search_documents is not None,
        "settings": attacks,
        "evaluation": {**evaluation, "model_context": request.context},
        "runtime": experiment.runtime.model_dump(mode="json", include=set(_DECIDED)),
        "attention": experiment.model.attention,
        "models": {arm: _files(pin) for arm, pin in request.pins.items()},
        "attacks": {kind: part for kind, part in own.items() if kind in request.attacks or (kind == "probe" and part)},
    }


def _fields(experiment: Experiment) -> set[str]:
    """Return what of the data decides which tokens a document has."""
    of_pairs = {"source_field", "target_field", "source_prefix", "source_length", "target_length"}
    return of_pairs if experiment.data.pairs else {"text_field"}


def _files(pin: Mapping[str, Any]) -> Json:
    """Return what identifies a model, wherever it lies."""
    return {"revision": pin["revision"], "files": dict(pin["files"])}
