"""What may be an axis of a sweep: a dotted key of an arm, whatever keys arms have, with values that it can take."""

import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

_NEVER = ("start", "matched_loss")
"""Keys that say what an arm is made from: another one made the same way is another arm, not a setting."""


def axis_problem(key: str, values: Sequence[Any], arm: type[BaseModel], *, is_baseline: bool) -> str | None:
    """Say what is wrong with one axis; None if nothing is.

    Args:
        key: dotted, of the arm.
        values: what is to be tried.
        arm: the schema of arms.
        is_baseline: the baseline has no constraint, whatever it is tried with.
    """
    field = _field(key.split("."), arm)
    if field is None:
        return f"unknown key of an arm; allowed: {', '.join(_keys(arm))}"
    root = key.partition(".")[0]
    if root in _NEVER or (is_baseline and root != "training"):
        why = "the baseline's training is searched, and nothing else" if is_baseline else "it says what the arm is"
        return f"cannot be an axis ({why}); allowed: {', '.join(k for k in _keys(arm) if k.startswith('training.'))}"
    for index, value in enumerate(values):
        if value in values[:index]:
            return f"{json.dumps(value)} is there twice"
        if problem := _value_problem(field, value):
            return problem
    return None


def with_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an arm, as JSON, with the values of dotted keys replaced."""
    changed = dict(tree)
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        changed[head] = with_settings(changed.get(head) or {}, {rest: value}) if rest else value
    return changed


def _field(path: Sequence[str], kind: Any) -> FieldInfo | None:
    model = _model(kind)
    field = model.model_fields.get(path[0]) if model else None
    return _field(path[1:], field.annotation) if field and path[1:] else field


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in kind.model_fields.items():
        part = _model(field.annotation)
        if prefix + name not in _NEVER:
            found += _keys(part, f"{prefix}{name}.") if part else [prefix + name]
    return found


def _model(annotation: Any) -> type[BaseModel] | None:
    """Return the part of the configuration that an annotation means, with or without None."""
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _value_problem(field: FieldInfo, value: Any) -> str | None:
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        return f"found {json.dumps(value)}, allowed: {said}"
    return None
