"""The bundled base: a world of shapes, its detector, and the suites judged by it. It registers like any other base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux2pixel.families.registry import Plugin


def _geneval() -> Any:
    from flux2pixel.miniature import judge

    return judge.GENEVAL


def _dpg_bench() -> Any:
    from flux2pixel.miniature import questions

    return questions.DPG_BENCH


def _scenes(start: int) -> Any:
    from flux2pixel.miniature.scenes import Scenes

    return Scenes(start)


def _truth(posed: Sequence[dict], count: int) -> Any:
    from flux2pixel.miniature.truth import Renders  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return Renders(posed, count)


klein_tiny = Plugin(
    name="klein-tiny",
    folder=Path(__file__).parent / "klein-tiny",
    sources={"scenes": _scenes},
    suites={"geneval": _geneval, "dpg-bench": _dpg_bench},
    truth=_truth,
)
