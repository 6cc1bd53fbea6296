"""The bundled base, klein-tiny, and its world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux2pixel.families.registry import Plugin


def _truth(posed: Sequence[dict], count: int) -> Any:
    from flux2pixel.miniature.truth import Renders

    return Renders(posed, count)


klein_tiny = Plugin("klein-tiny", str(Path(__file__).parent / "klein-tiny"), truth=_truth)
