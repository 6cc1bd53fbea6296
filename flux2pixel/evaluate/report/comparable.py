"""Which published figures a suite's scores may be compared with, and why the others may not.

Protocols differ between papers (seeds, resolution, rewritten prompts, scorer versions) by 0.02 to 0.04 in GenEval:
even a comparable figure is one to read beside a baseline measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flux2pixel.evaluate.report.tables import KEYS

PROJECT = "AsymFLUX.2 project page and paper, 32 steps, 1024 x 1024"

# Only figures whose protocol is the official one; (model, score, where it was published).
PUBLISHED: Mapping[str, Sequence[tuple[str, float, str]]] = {
    "geneval": (
        ("Stable Diffusion 1.5", 0.43, "GenEval's README"),
        ("Stable Diffusion 2.1", 0.50, "GenEval's README"),
        ("SDXL", 0.55, "GenEval's README"),
        ("IF-XL", 0.61, "GenEval's README"),
        ("FLUX.2 klein base 9B", 0.80, PROJECT),
        ("AsymFLUX.2 klein 9B", 0.82, PROJECT),
    ),
    "dpg-bench": (("FLUX.2 klein base 9B", 85.2, PROJECT), ("AsymFLUX.2 klein 9B", 86.8, PROJECT)),
    "hpsv3": (
        ("FLUX.1-dev", 10.43, "HPSv3's README"),
        ("Kolors", 10.55, "HPSv3's README"),
        ("SDXL", 8.20, "HPSv3's README"),
        ("FLUX.2 klein base 9B", 9.50, PROJECT),
        ("AsymFLUX.2 klein 9B", 10.66, PROJECT),
    ),
}
NOTES = {
    "dpg-bench": "Published figures contain the official script's defects: compare `official`, not `repaired`; "
    "L1 and L2 of papers are unreliable, since several processes scramble them.",
    "hpsv3": "The project page scores captions at 1024 x 1024; HPSv3's own table is of official sizes, and whether its "
    "texts held the file name is not known.",
}


def comparable(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every suite scored: ``comparable``, a ``statement``, the ``reasons`` against, the ``published`` figures."""
    found = {}
    for suite, key in KEYS.items():
        rows = {name: row[key] for name, row in models.items() if key in row}
        if not rows:
            continue
        reasons = list(dict.fromkeys(reason for name, row in rows.items() for reason in _reasons(suite, name, row)))
        if reasons:
            statement = "Not comparable with published figures; models of this report compare with each other."
        else:
            statement = "Official prompts, images and judge: comparable with figures published under the same protocol."
        notes = [NOTES[suite]] if suite in NOTES and not reasons else []
        published = [{"model": m, "score": s, "source": w} for m, s, w in PUBLISHED[suite]] if not reasons else []
        found[suite] = {
            "comparable": not reasons,
            "statement": statement,
            "reasons": reasons + notes,
            "published": published,
        }
    return found


def _reasons(suite: str, name: str, row: Mapping[str, Any]) -> list[str]:
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
