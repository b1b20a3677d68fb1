"""What is asked of the suite: models, documents and settings, as one experiment whose arms are the models."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isotone.attacks.protocol import PrefixProtocol
from isotone.config import NO_ARMS, Attacks, Experiment, Model
from isotone.config_io import experiment_from_dict
from isotone.errors import UsageError
from isotone.models import pin_model
from isotone.results import BASELINE

ATTACKS = ("hotflip", "triggers", "gcg", "coordinate", "random")
"""What is made unless something else is asked for."""

FURTHER = ("gcg", "coordinate", "pgd", "frequency")
"""Attacks that have a part of their own in ``attacks``, which is null where they are not made."""

ALL_ATTACKS = ("hotflip", "triggers", *FURTHER, "random")

_MATCHED = "_matched"
"""How the names of controls end, and no others: their logs lie in the same folder."""

_DECLARED = ("hotflip", "triggers", "gcg", "coordinate")
"""Attacks whose Δ is confirmatory where they are made."""

_SETTABLE = (
    *("attacks.", "analysis.", "runtime.", "evaluation.stride", "evaluation.context", "evaluation.batch_size"),
    *("data.source_prefix", "data.source_length", "data.target_length"),
    *("model.revision", "model.gguf_file", "model.attention", "model.allow_pickle", "model.trust_remote_code"),
    "data.shuffle_seed",
)
"""What of an experiment means something here."""


@dataclass(frozen=True)
class Request:
    """Everything that decides the results, but for what the machine decides.

    Attributes:
        experiment: its arms are the given models, of which the first is the baseline.
        attacks: of ``ALL_ATTACKS``.
        sources: each given model's source, by arm.
        pins: what ``pin_model`` says of each, by arm.
        documents: the file.
        search_documents: a file of its own for what is fitted; None: a part of ``documents``.
        matched_loss: each model but the first gets a control, once the clean losses are known.
    """

    experiment: Experiment
    attacks: tuple[str, ...]
    sources: Mapping[str, str]
    pins: Mapping[str, Mapping[str, Any]]
    documents: Path
    search_documents: Path | None
    matched_loss: bool

    @property
    def context(self) -> int | None:
        """Tokens that every model can read; None where none of them has a limit."""
        return min((pin["context"] for pin in self.pins.values() if pin["context"]), default=None)

    def model(self, arm: str) -> Model:
        """Return where an arm's model comes from, at the revision that was pinned."""
        return _model(self.experiment.model, self.sources[arm], self.pins[arm]["revision"])


@dataclass(frozen=True)
class Options:
    """What is asked for beside models and documents; None: the default of ``attacks``, or what fits the models."""

    attacks: Sequence[str] = ATTACKS
    text_field: str = "text"
    prefix: int | None = None
    gap: int | None = None
    continuation: int | None = None
    flips: int | None = None
    budget_tokens: int | None = None
    num_documents: int | None = None
    matched_loss: bool = False
    overrides: Sequence[str] = field(default_factory=tuple)
    source_field: str | None = None
    target_field: str | None = None


def make_request(models: Sequence[str], documents: Path, search_documents: Path | None, options: Options) -> Request:
    """Return the request, checked.

    Raises:
        UsageError: what is asked for cannot be done; names it in one line.
    """
    attacks = _attacks(options.attacks)
    sources = name_models(models)
    for item in options.overrides:
        _require_settable(item, attacks)
        if len(sources) > 1 and item.startswith(("model.revision", "model.gguf_file")):
            raise UsageError(
                f"--set {item}: it would hold for every MODEL; give folders or files that say which they are"
            )
    tree = _tree(sources, attacks, documents, options)
    # the models' own settings decide what is read of them, and their contexts which protocol fits
    of_models = [item for item in options.overrides if item.startswith("model.")]
    first = experiment_from_dict({key: tree[key] for key in ("name", "arms")}, "isotone attack", of_models)
    pins = {arm: pin_model(_model(first.model, source)) for arm, source in sources.items()}
    if _are_pairs(sources, pins, options):
        tree["data"] = {
            "source": str(documents),
            "source_field": options.source_field or "source",
            "target_field": options.target_field or "target",
        }
        tree["attacks"]["protocol"] = _given({key: getattr(options, key) for key in ("prefix", "gap", "continuation")})
        experiment = experiment_from_dict(tree, "isotone attack", options.overrides)
        return Request(experiment, attacks, sources, pins, documents, search_documents, options.matched_loss)
    contexts = {arm: pin["context"] for arm, pin in pins.items() if pin["context"]}
    fitting = PrefixProtocol.for_context(min(contexts.values(), default=1024))
    tree["attacks"]["protocol"] = _given(
        {"prefix": fitting.prefix, "gap": fitting.gap, "continuation": fitting.continuation},
        {key: getattr(options, key) for key in ("prefix", "gap", "continuation")},
    )
    experiment = experiment_from_dict(tree, "isotone attack", options.overrides)
    _require_fit(experiment.attacks, attacks, contexts)
    return Request(experiment, attacks, sources, pins, documents, search_documents, options.matched_loss)


def _are_pairs(sources: Mapping[str, str], pins: Mapping[str, Mapping[str, Any]], options: Options) -> bool:
    """Say whether the models are encoder-decoders, which read pairs.

    Raises:
        UsageError: some are and some are not, or fields of pairs are given and none is.
    """
    kinds = {arm: bool(pin.get("encoder_decoder")) for arm, pin in pins.items()}
    given = options.source_field or options.target_field
    for arm, is_pair in kinds.items():
        if is_pair != kinds[BASELINE]:
            raise UsageError(
                f"{arm}: {sources[arm]} is {'an' if is_pair else 'no'} encoder-decoder and {sources[BASELINE]} is "
                f"{'one' if kinds[BASELINE] else 'none'}; what they lose cannot be compared; attack them one by one"
            )
    if given and not kinds[BASELINE]:
        raise UsageError(
            f"--source-field, --target-field: {sources[BASELINE]} is no encoder-decoder and reads no pairs; give "
            "--text-field, or a model such as T5"
        )
    return kinds[BASELINE]


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Return the models by the names of their arms: as given (NAME=MODEL), else from the end of their source.

    Raises:
        UsageError: there is none, a name is no name or is given twice, or the first one is not to be the baseline.
    """
    if not models:
        raise UsageError("MODEL: give at least one model")
    named: dict[str, str] = {}
    for number, item in enumerate(models):
        name, source = _split(item)
        if number == 0 and name not in (None, BASELINE):
            raise UsageError(
                f"{item}: the first MODEL is the {BASELINE} that others are compared with; leave its name out"
            )
        if name is None:
            name = BASELINE if number == 0 else _free_name(source, named)
        if name.endswith(_MATCHED):
            raise UsageError(
                f"{item}: names that end in {_MATCHED} are those of controls; give another one as NAME=MODEL"
            )
        if name in named:
            raise UsageError(f"{item}: there are two models of the name {name}; give another one as NAME=MODEL")
        named[name] = source
    return named


def matched_name(arm: str) -> str:
    """Return the name of an arm's control at matched loss."""
    return f"{arm}{_MATCHED}"


def source_name(source: str) -> str:
    """Return the end of a model's source: the folder, the file, or the name on the hub without its owner."""
    path = Path(source)
    return (path.resolve() if path.exists() else path).name


def _split(item: str) -> tuple[str | None, str]:
    name, equals, source = item.partition("=")
    if not equals or Path(item).exists():
        return None, item
    if not name.isidentifier() or name in NO_ARMS or not source:
        raise UsageError(f"{item}: a name is made of letters, digits and _, and a model stands behind the =")
    return name, source


def _free_name(source: str, taken: Iterable[str]) -> str:
    name = re.sub(r"\W", "_", source_name(source).removesuffix(".gguf"), flags=re.ASCII) or "model"
    name = name if name.isidentifier() else f"m_{name}"
    names = [name, *(f"{name}_{number}" for number in range(2, 1000))]
    return next(n for n in names if n not in (*taken, *NO_ARMS, BASELINE))


def _attacks(asked: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if name not in ALL_ATTACKS:
            raise UsageError(f"--attacks: there is no attack {name!r}; allowed: {', '.join(ALL_ATTACKS)}")
    if not asked:
        raise UsageError(f"--attacks: give at least one of {', '.join(ALL_ATTACKS)}")
    return tuple(name for name in ALL_ATTACKS if name in asked)


def _tree(sources: Mapping[str, str], attacks: Sequence[str], documents: Path, options: Options) -> dict[str, Any]:
    """Return the experiment as it would stand in a file."""
    unasked = {} if "hotflip" in attacks else {"methods": ["once"]}  # the one that needs no budget
    family = [{"metric": "nll"}]
    family += [{"metric": "delta_nll", "attack": name} for name in _DECLARED if name in attacks]
    return {
        "name": "attack",
        "data": {"source": str(documents), "text_field": options.text_field},
        "arms": {arm: {"train": False} for arm in sources},
        "attacks": _given(
            {"hotflip": _given(unasked, {"flips": options.flips}), "transfer": len(sources) > 1},
            {"budget_tokens": options.budget_tokens, "num_documents": options.num_documents},
            {kind: {} for kind in FURTHER if kind in attacks},
        ),
        "analysis": {"family": family},
    }


def _given(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts together, without what is None."""
    return {key: value for part in parts for key, value in part.items() if value is not None}


def _model(settings: Model, source: str, revision: str | None = None) -> Model:
    return settings.model_copy(update={"source": source, "revision": revision or settings.revision})


def _require_settable(item: str, attacks: Sequence[str]) -> None:
    if not item.startswith(_SETTABLE):
        raise UsageError(
            f"--set {item}: nothing is made from it here; allowed: {', '.join(f'{key}…' for key in _SETTABLE)}"
        )
    path = item.partition("=")[0].strip().split(".")
    if path[1] in FURTHER and (len(path) == 2 or path[1] not in attacks):
        raise UsageError(f"--set {item}: --attacks alone says which attacks are made; name {path[1]} there, or not")


def _require_fit(config: Attacks, attacks: Sequence[str], contexts: Mapping[str, int]) -> None:
    """Check that every model can read the texts, and that a trigger before them leaves the same of them to each."""
    length, trigger = config.protocol.length, config.triggers.length + 1  # BOS stands before it
    for arm, context in contexts.items():
        if context < length:
            raise UsageError(
                f"{arm} reads {context} tokens, and attacks.protocol asks for {length}; give a shorter one with "
                "--prefix, --gap and --continuation"
            )
    if "triggers" in attacks and len({min(length, context - trigger) for context in contexts.values()}) > 1:
        raise UsageError(
            f"attacks.triggers: {length} tokens with a trigger of {config.triggers.length} before them do not fit "
            f"every model alike ({', '.join(f'{arm} {context}' for arm, context in contexts.items())}); give a shorter "
            "protocol with --prefix, --gap and --continuation"
        )
