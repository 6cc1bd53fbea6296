"""Which published figures a suite's scores may be compared with, and why the others may not.

Protocols differ between papers (seeds, resolution, rewritten prompts, scorer versions) by 0.02 to 0.04 in GenEval:
even a comparable figure is one to read beside a baseline measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux2pixel.evaluate.report.tables import KEYS

PROJECT = "AsymFLUX.2 project page and paper"
README = "GenEval's README"


@dataclass(frozen=True)
class Published:
    """One published figure and what of its protocol is known; None: not stated where it was published."""

    model: str
    score: float
    source: str
    size: str | None = None  # width x height
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None  # of the pixel noise level at 1024 x 1024

    @property
    def protocol(self) -> str:
        """What is known of how it was drawn, in words."""
        known = [f"{name} {value:g}" for name in SETTINGS if (value := getattr(self, name)) is not None]
        return ", ".join([*([self.size] if self.size else []), *known]) or "not stated"


SETTINGS = ("steps", "guidance", "shift")
_KLEIN = ("1024x1024", 32, 4.0, 17.0)
PUBLISHED: Mapping[str, Sequence[Published]] = {
    "geneval": (
        Published("Stable Diffusion 1.5", 0.43, README, "512x512"),
        Published("Stable Diffusion 2.1", 0.50, README),
        Published("SDXL", 0.55, README, "1024x1024"),
        Published("IF-XL", 0.61, README, "1024x1024"),
        Published("FLUX.2 klein base 9B", 0.80, PROJECT, "1024x1024"),
        Published("AsymFLUX.2 klein 9B", 0.82, PROJECT, *_KLEIN),
    ),
    "dpg-bench": (
        Published("FLUX.2 klein base 9B", 85.2, PROJECT, "1024x1024"),
        Published("AsymFLUX.2 klein 9B", 86.8, PROJECT, *_KLEIN),
    ),
    "hpsv3": (
        Published("FLUX.1-dev", 10.43, "HPSv3's README"),
        Published("Kolors", 10.55, "HPSv3's README"),
        Published("SDXL", 8.20, "HPSv3's README"),
        Published("FLUX.2 klein base 9B", 9.50, PROJECT, "1024x1024"),
        Published("AsymFLUX.2 klein 9B", 10.66, PROJECT, *_KLEIN),
    ),
}
NOTES = {
    "dpg-bench": "Published figures contain the official script's defects: compare `official`, not `repaired`; "
    "L1 and L2 of papers are unreliable, since several processes scramble them.",
    "hpsv3": "The project page scores captions; whether HPSv3's own table did, with the file name, is not known.",
}


def comparable(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every suite scored: ``comparable``, a ``statement``, the ``reasons`` against, the ``published`` figures.

    A published figure is listed if it is of the size drawn here, or of none stated. ``comparable`` is true only where
    one of them states its steps, guidance and shift, and every model here was drawn at those.
    """
    found = {}
    for suite, key in KEYS.items():
        rows = {name: row for name, row in models.items() if key in row}
        if not rows:
            continue
        against = [reason for name, row in rows.items() for reason in _reasons(name, row[key])]
        drawn = {name: _drawn(row, key) for name, row in rows.items()}
        listed: list[Published] = []
        if not against:
            listed = [one for one in PUBLISHED[suite] if all(one.size in (None, d.get("size")) for d in drawn.values())]
            stated = [one for one in listed if one.size and all(getattr(one, name) is not None for name in SETTINGS)]
            differing = [_differences(one, drawn) for one in stated]
            if not listed:
                against = [
                    f"no figure is published at {', '.join(sorted({str(d.get('size')) for d in drawn.values()}))}"
                ]
            elif not stated:
                against = ["no figure of this size is published with its steps, guidance and shift"]
            elif all(differing):
                against = min(differing, key=len)
        shown = "; ".join(f"{name}: {_words(settings)}" for name, settings in drawn.items())
        statement = (
            "Not comparable with published figures; models of this report compare with each other."
            if against
            else "Official prompts, images, judge and sampler: comparable with figures of the same protocol."
        )
        notes = [NOTES[suite]] if suite in NOTES and listed else []
        found[suite] = {
            "comparable": not against,
            "statement": statement,
            "reasons": list(dict.fromkeys(against)) + ([f"drawn at {shown}"] if shown and listed else []) + notes,
            "published": [
                {"model": p.model, "score": p.score, "source": p.source, "protocol": p.protocol} for p in listed
            ],
        }
    return found


def _drawn(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Size, steps, guidance and shift that a model was drawn at, as far as the report knows them."""
    generation = row.get("generation") or {}
    sampler = generation.get("sampler") or generation.get("sample") or generation
    sizes = ((row[key].get("protocol") or {}).get("sizes") or {}).keys()
    found = {"size": next(iter(sizes)) if len(sizes) == 1 else "several sizes" if sizes else None}
    return found | {name: sampler.get(name) for name in SETTINGS}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) or "unknown settings"


def _differences(published: Published, drawn: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In what the models here were drawn otherwise than a published one."""
    found = []
    for name, settings in drawn.items():
        for key in SETTINGS:
            wanted, had = getattr(published, key), settings.get(key)
            if had is None or abs(had - wanted) > 1e-6 * abs(wanted):
                shown = "unknown" if had is None else f"{had:g}"
                found.append(f"{name}: {key} {shown}, {published.model} was published at {wanted:g}")
    return found


def _reasons(name: str, row: Mapping[str, Any]) -> list[str]:
    protocol = row.get("protocol") or {}
    reasons = []
    if protocol.get("judge") != "official":
        reasons.append(f"judged by {protocol.get('judge')}, not by the official scorer")
    if not protocol.get("prompts_official"):
        reasons.append("other prompts or another number of images than the protocol's")
    if protocol.get("prompts_rewritten") is True:
        reasons.append("prompts of one's own or rewritten, which raises scores")
    if protocol.get("prompts_rewritten") not in (True, False):
        reasons.append(f"{name}: images made elsewhere; with which prompts, steps and seeds is not known here")
    if lost := len(row.get("missing") or ()):
        reasons.append(f"{name}: partial, {lost} images are missing")
    return reasons
