"""Reading a ``config.json`` as diffusers reads it: defaults for absent keys, unknown keys dropped, nonsense refused."""

from __future__ import annotations

import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import log, quiet_libraries

LARGEST = 1_000_000  # no width, length or size of any published model comes near
DEEPEST = 1_000  # blocks
NESTED = 4  # lists in lists in lists


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` or ``model_index.json``. Raises UsageError naming the file if it is no JSON object."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: missing; the folder is not a complete diffusers model") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: holds a {type(config).__name__}, not an object of settings; download it again")
    return config


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments out of a written configuration: without diffusers' own ``_`` entries."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def init_config(cls: Any, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every constructor argument of a stock class, from a written configuration, by diffusers' own rules.

    Absent keys get the class's defaults, keys that it does not know are dropped with one printed line. Tuples are
    lists, as in JSON. ``where`` is the file, for messages.
    Raises UsageError naming file and key for a value of the wrong type or beyond any model.
    """
    quiet_libraries()
    given, unused, _ = cls.extract_init_dict(dict(config))
    unknown = sorted(name for name in unused if not name.startswith("_"))
    if unknown:
        log(f"{where}: {cls.__name__} knows no {', '.join(unknown)}; ignored, as diffusers does")
    hints, full = typing.get_type_hints(cls.__init__), {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        value = given.get(name, parameter.default)
        if name in given:
            problem = _problem(name, value, hints.get(name), parameter.default)
            if problem:
                raise UsageError(f"{where}: {name} = {_short(value)} {problem}; download the file again")
        full[name] = _as_json(value)
    return full


def _problem(name: str, value: Any, hint: Any, default: Any) -> str:
    """Why ``value`` cannot be an argument of that name; empty if it can."""
    if value is None:
        return "" if default is None or _allows_none(hint) else "is not allowed to be null"
    like = default if default not in (None, inspect.Parameter.empty) else None
    if not _fits(value, hint, like):
        kind = type(like).__name__ if like is not None else str(hint).replace("typing.", "").removeprefix("<class ")
        return f"is not of the type that its class wants ({kind.strip(chr(39) + '>')})"
    if _depth(value) > NESTED:
        return "is nested too deeply"
    for number in _numbers(value):
        whole = isinstance(number, int)
        if not math.isfinite(number) or abs(number) > LARGEST or (whole and number < 0):
            return f"is out of bounds: at most {LARGEST}, and not negative"
        if "layers" in name and "dual" not in name and number > DEEPEST:
            return f"is out of bounds: at most {DEEPEST} blocks"
        if "eps" in name and number <= 0:
            return "must be above 0"
        if (name.endswith(("channels", "heads", "dim", "patch_size")) or name == "sample_size") and number <= 0:
            return "must be above 0"
    return ""


def _fits(value: Any, hint: Any, like: Any) -> bool:
    """Whether a JSON value is of the annotated type, or, without an annotation that says, of the default's."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one, like) for one in inside if one is not type(None))
    if origin is typing.Literal:
        return value in inside
    kind = origin or hint
    if isinstance(like, list | tuple) and kind in (int, float) and isinstance(value, list | tuple):
        kind = list  # diffusers annotates some lists by their elements
    match kind:
        case _ if kind is bool:
            return isinstance(value, bool)
        case _ if kind is int:
            return (isinstance(value, int) and not isinstance(value, bool)) or _whole(value)
        case _ if kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _ if kind is str:
            return isinstance(value, str)
        case _ if kind in (list, tuple):
            element = inside[0] if inside and inside[0] is not Ellipsis else None
            return isinstance(value, list | tuple) and all(_fits(one, element, None) for one in value)
    if like is not None and kind is None:
        return _fits(value, type(like), None)
    return not isinstance(value, dict)


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _allows_none(hint: Any) -> bool:
    return hint is None or type(None) in typing.get_args(hint)


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _as_json(value: Any) -> Any:
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
