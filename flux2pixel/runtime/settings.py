"""Typed settings: a frozen dataclass whose fields say what they mean and which values they take, read from TOML.

A field's type is its default's, or for a default of ``None`` (nothing set) the other half of its annotation.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, TypeVar, get_args

from flux2pixel.runtime.errors import UsageError

T = TypeVar("T")


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """Declare a field: its default, its meaning, and the values it may take (``low`` of a string: its length)."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "above": above, "high": high})


def options(table: Any) -> dict[str, Field[Any]]:
    """The settings and sections of a settings dataclass (or one of its values) by name."""
    return {item.name: item for item in fields(table) if item.metadata or is_dataclass(item.default)}


def merge(target: T, table: Mapping[str, Any], where: str) -> T:
    """Return the settings ``target`` with the values of ``table``, each checked.

    Raises UsageError that names ``where``, the key, and the nearest one known.
    """
    return _merge(target, table, where, "", target)


def _merge(target: Any, table: Mapping[str, Any], where: str, prefix: str, root: Any) -> Any:
    known = options(target)
    changes: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in known:
            what = "key" if prefix else "section or key"
            raise UsageError(f"{where}: unknown {what} {key!r}; {_suggest(key, known, root)}")
        current = getattr(target, name)
        if not is_dataclass(current):
            changes[name] = _check(known[name], value, f"{where}: {key}")
        elif isinstance(value, Mapping):
            changes[name] = _merge(current, value, where, f"{key}.", root)
        else:
            first = next(iter(options(current)))
            raise UsageError(f"{where}: {key} is a section; set one of its keys, such as {key}.{first}")
    return replace(target, **changes)


def layered(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over each other, the last on top, section by section."""
    whole: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            both = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
            whole[name] = layered(whole[name], value) if both else value
    return whole


def parse_assignment(assignment: str, target: Any) -> dict[str, Any]:
    """Turn ``section.key=value`` into a table. The value is TOML; what is not is taken as a string.

    ``target``, settings, tells which keys are strings, since a folder may be called 2024.
    """
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not (key and equals):
        raise UsageError(f"--set {assignment}: write it as section.key=value, such as sample.steps=8")
    value: Any = text
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            value = parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    *sections, name = key.split(".")
    for section in sections:
        target = getattr(target, section, None)
    item = options(target).get(name) if is_dataclass(target) else None
    if item is not None and not isinstance(value, str) and _kind(item) is str:
        value = text
    table: dict[str, Any] = {name: value}
    for section in reversed(sections):
        table = {section: table}
    return table


def plain(table: Any) -> dict[str, Any]:
    """Settings as nested dictionaries that JSON and TOML can both hold; what is ``None`` is left out."""
    made: dict[str, Any] = {}
    for name in options(table):
        value = getattr(table, name)
        if is_dataclass(value):
            made[name] = plain(value)
        elif value is not None:
            made[name] = list(value) if isinstance(value, tuple) else value
    return made


def toml(value: Any) -> str:
    """A value as TOML; a JSON string is a TOML basic string once DEL is escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml(entry) for entry in value)}]"
    return repr(value) if isinstance(value, (int, float)) else str(value)


def _suggest(key: str, known: Mapping[str, Any], root: Any) -> str:
    """The nearest key of the same section, else of any section of ``root``, else the list of those known."""
    prefix, _, name = key.rpartition(".")
    everywhere = {
        inner: f"{outer}.{inner}"
        for outer, item in options(root).items()
        if is_dataclass(item.default)
        for inner in options(item.default)
    }
    near = difflib.get_close_matches(name, known, n=1)
    if near and name not in everywhere:
        return f"did you mean {f'{prefix}.' if prefix else ''}{near[0]}?"
    if near := difflib.get_close_matches(name, everywhere, n=1):
        return f"did you mean {everywhere[near[0]]}?"
    return f"known here: {', '.join(known)}"


def _kind(item: Field[Any]) -> type:
    """The type of a setting."""
    if item.default is not None:
        return type(item.default)
    return next(half for half in get_args(item.type) if half is not NoneType)


def _check(item: Field[Any], value: Any, where: str) -> Any:
    """Return ``value`` as the type of the field, or raise UsageError with what it must be."""
    default, rule, kind = item.default, item.metadata, _kind(item)
    example = "" if default in (None, ()) else f", such as {toml(default)}"
    if kind is tuple:
        listed = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        if not listed or (default and not value):
            raise UsageError(f"{where} = {toml(value)} must be a list of strings{example}")
        for entry in value:
            _check_choice(entry, rule["choices"], where)
        return tuple(dict.fromkeys(value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise UsageError(f"{where} = {toml(value)} must be {words[kind]}{example}")
    if isinstance(value, str):
        if not value and (default or rule["low"]):
            usual = f"its default is {toml(default)}" if default else "leave it out"
            raise UsageError(f'{where} = "" must not be empty; {usual}')
        _check_choice(value, rule["choices"], where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(value, rule, where)
    return value


def _check_choice(value: str, choices: tuple[str, ...], where: str) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where} = {toml(value)} must be one of {', '.join(choices)}{hint}")


def _check_range(value: float, rule: Mapping[str, Any], where: str) -> None:
    low, above, high = rule["low"], rule["above"], rule["high"]
    if not math.isfinite(value):
        raise UsageError(f"{where} = {value} must be finite")
    if low is not None and value < low:
        raise UsageError(f"{where} = {value} must be at least {low}")
    if above is not None and value <= above:
        raise UsageError(f"{where} = {value} must be above {above}")
    if high is not None and value > high:
        raise UsageError(f"{where} = {value} must be at most {high}")
