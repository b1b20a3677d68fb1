"""Reads experiments from presets and YAML files, and says in one line per fault what is wrong with them.

Nothing heavy is imported: ``isotone config``, ``presets``, ``status`` and ``--help`` stay fast.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from isotone.config import Experiment
from isotone.errors import UsageError

DEFAULT_SEED = 42
_PRESETS = resources.files("isotone") / "presets"
Location = tuple[str | int, ...]
T = TypeVar("T", bound=BaseModel)


class Preset(NamedTuple):
    """A configuration that comes with the package."""

    name: str
    description: str


# --- reading ---------------------------------------------------------------------------------------------------------


def load_experiment(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a preset or YAML file, with single values replaced.

    Args:
        source: the name of a preset, or a YAML file (``.yaml`` or a slash make it a file). A file without
            ``name`` is named by its stem.
        overrides: ``key=value`` pairs such as ``training.lr=1e-4``; the value is read as YAML.

    Raises:
        UsageError: a line for each fault: file, key, what was found, what is allowed.
    """
    label, text = _read_source(source)
    tree = _parse(text, label)
    if not isinstance(tree, dict):
        raise UsageError(f"{label}: expected keys and values, found {_shown(tree)}")
    tree.setdefault("name", Path(source).stem if is_file_name(source) else str(source))
    overridden = [_override(tree, item) for item in overrides]
    return _validate(tree, label, overridden, Experiment)


def experiment_from_dict(
    tree: Mapping[str, Any], label: str = "experiment", overrides: Sequence[str] = ()
) -> Experiment:
    """Return the experiment that a mapping describes; ``label`` stands for the file in errors.

    ``overrides`` are as in ``load_experiment``.

    Raises:
        UsageError: as in ``load_experiment``.
    """
    tree = dict(tree)
    overridden = [_override(tree, item) for item in overrides]
    return _validate(tree, label, overridden, Experiment)


def read_part(kind: type[T], label: str, text: str) -> T:
    """Return a part of a configuration that stands in a YAML file of its own; ``label`` names the file in errors.

    Raises:
        UsageError: as in ``load_experiment``.
    """
    tree = _parse(text, label)
    if not isinstance(tree, dict):
        raise UsageError(f"{label}: expected keys and values, found {_shown(tree)}")
    return _validate(tree, label, [], kind)


def list_presets() -> list[Preset]:
    """Return the presets in alphabetical order, ``pocket`` ones first."""
    return [Preset(name, load_experiment(name).description) for name in _preset_names()]


def resolve_seed(experiment: Experiment, seed: int | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Return the seed of a run: the one given, else EXPERIMENT_SEED, else the first of ``seeds``.

    Raises:
        UsageError: it is not a whole number from 0 to 2^63 - 1.
    """
    where, found = "--seed", str(seed)
    if seed is None:
        where, found = "EXPERIMENT_SEED", environment.get("EXPERIMENT_SEED", "").strip()
    if not found:
        return experiment.seeds[0]
    if not re.fullmatch(r"[0-9]{1,19}", found) or int(found) >= 2**63:
        raise UsageError(f"{where}: found {found!r}, allowed: a whole number from 0 to 2^63 - 1")
    return int(found)


# --- writing ---------------------------------------------------------------------------------------------------------


def dump_yaml(experiment: Experiment, defaults: bool = False) -> str:
    """Return an experiment as YAML that ``load_experiment`` reads back equal.

    Args:
        experiment: what to write.
        defaults: also write the values that equal their default.
    """
    tree = experiment.model_dump(mode="json", exclude_defaults=not defaults)
    if experiment.data.pairs:  # the default is another one there
        hotflip = tree.setdefault("attacks", {}).setdefault("hotflip", {})
        hotflip.setdefault("published_success", experiment.attacks.hotflip.published_success)
    tree = {"name": experiment.name, **tree}
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of an experiment file, for editors and checkers."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}


# --- sources ---------------------------------------------------------------------------------------------------------


def is_file_name(source: str | Path) -> bool:
    """Tell whether a source names a file, and not something that comes with isotone."""
    return isinstance(source, Path) or source.endswith((".yaml", ".yml", ".json")) or os.sep in source


def _read_source(source: str | Path) -> tuple[str, str]:
    if not is_file_name(source):
        names = _preset_names()
        if source in names:
            return f"preset {source}", _preset_text(str(source))
        hint = _nearest(str(source), names) or f"presets: {', '.join(names)}; or give a YAML file"
        raise UsageError(f"there is no preset {str(source)!r}; {hint}")
    try:
        return str(source), Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UsageError(
            f"{source}: {error.strerror or error}; give a YAML file or a preset (isotone presets)"
        ) from error


def _preset_names() -> list[str]:
    names = sorted(entry.name.removesuffix(".yaml") for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml"))
    return sorted(names, key=lambda name: not name.startswith("pocket"))


def _preset_text(name: str) -> str:
    return (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (``1e-4`` is a number, ``no`` is text), where a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back equal: text that looks like a number, or holds odd line breaks, is quoted."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        breaks = any(mark in text for mark in "\x85\u2028\u2029")  # YAML's line breaks: plain, they are folded
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_str)


_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _starts = ["" if c == "\0" else c for c in _first]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _parse(text: str, label: str) -> Any:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{label}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from error
    try:
        json.dumps(tree, default=str)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{label}: something in it contains itself, by an anchor (&, *) or without end") from error
    return tree


def _override(tree: dict[str, Any], item: str) -> Location:
    """Set one ``a.b=value`` in the tree; returns the key as a location."""
    key, equals, text = item.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UsageError(f"--set {item}: expected key=value, such as training.lr=1e-4")
    node = tree
    for depth, part in enumerate(path[:-1]):
        node[part] = dict(node[part]) if isinstance(node.get(part), dict) else node.get(part)
        if node[part] is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise UsageError(f"--set {item}: {'.'.join(path[: depth + 1])} is a single value, it has no keys")
        node = node[part]
    node[path[-1]] = _parse(text, f"--set {item}")
    return path


# --- faults ----------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (in quotes)",
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
}


def _validate(tree: Mapping[str, Any], label: str, overridden: list[Location], kind: type[T]) -> T:
    try:
        # by way of JSON, in which a list may be a tuple and yet "8" or true is no number
        return kind.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        inner = [
            f for f in faults if not any(g["loc"] != f["loc"] and g["loc"][: len(f["loc"])] == f["loc"] for g in faults)
        ]
        described = [_describe(fault, fault["loc"], kind) for fault in inner]
        raise UsageError("\n".join(f"{_origin(line, label, overridden)}: {line}" for line in described)) from error


def _origin(line: str, label: str, overridden: list[Location]) -> str:
    """Say where the value at fault was given: on the command line, or in the file."""
    key = line.partition(":")[0] + "."
    given = (".".join(map(str, path)) + "." for path in overridden)
    return "--set" if any(key.startswith(path) or path.startswith(key) for path in given) else label


def _describe(fault: Any, location: Location, root: type[BaseModel]) -> str:
    """Say in one line which key is wrong, what was found and what is allowed."""
    key, kind = ".".join(map(str, location)), fault["type"]
    if kind == "extra_forbidden":
        siblings = list(_keys_at(location[:-1], root))
        elsewhere = [name for name in _all_keys(root) if name.rpartition(".")[2] == str(location[-1])]
        prefix = "".join(f"{part}." for part in location[:-1])
        hint = _nearest(key, [prefix + name for name in siblings])
        hint = hint or (f"did you mean {elsewhere[0]}?" if elsewhere else "")
        return f"{key}: unknown key; {hint or 'allowed: ' + ', '.join(siblings)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{key}{'.' if re.match(r'[a-z_.]+: ', message) else ': '}{message}" if key else message
    if kind == "literal_error":
        allowed = fault["ctx"]["expected"]
        hint = _nearest(str(fault["input"]), re.findall(r"'([^']*)'", allowed))
        return f"{key}: found {_shown(fault['input'])}, allowed: {allowed}{'; ' + hint if hint else ''}"
    if kind in ("too_short", "too_long"):
        bound, number = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"{key}: found {_shown(fault['input'])}, allowed: {bound} {fault['ctx'][number]} of them"
    expected = _EXPECTED.get(kind) or fault["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"{key}: found {_shown(fault['input'])}, allowed: {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _nearest(word: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.rpartition(".")[2], [name.rpartition(".")[2] for name in names], n=1)
    return next((f"did you mean {name}?" for name in names if found and name.rpartition(".")[2] == found[0]), "")


def _keys_at(location: Location, root: type[BaseModel]) -> Iterator[str]:
    """Yield the keys that the schema knows at a location."""
    kind: Any = root
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = _without_none(kind.model_fields[str(part)].annotation)
        else:
            kind = _without_none(get_args(kind)[-1])
    yield from kind.model_fields


def _all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of the schema with its path; names of arms are left open."""
    for name, field in kind.model_fields.items():
        annotation = _without_none(field.annotation)
        yield prefix + name
        if get_origin(annotation) is dict:
            annotation, name = get_args(annotation)[1], f"{name}.NAME"
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _all_keys(annotation, f"{prefix}{name}.")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation
