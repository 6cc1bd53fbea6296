"""The rows of the report's tables: scores side by side with intervals, what each means, and which lead outside theirs.

Nothing here is HTML: the page's template writes what these return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flux2pixel.runtime.page import finite, number

Report = Mapping[str, Any]

NAMES = {"base": "Latent base", "converted": "Converted", "readout": "Readout, not finetuned", "finetuned": "Finetuned"}
SHORT = {"base": "Latent base", "converted": "Converted", "readout": "Readout", "finetuned": "Finetuned"}
LABELS = {"geneval": "GenEval", "dpg-bench": "DPG-Bench", "hpsv3": "HPSv3", "fidelity": "Fidelity"}
KEYS = {"geneval": "geneval", "dpg-bench": "dpg_bench", "hpsv3": "hpsv3"}  # of a suite in report.json
TOPS = {"geneval": 1.0, "dpg-bench": 100.0}  # scales with an end; HPSv3's has none
FEW = 5  # prompts: over fewer, resampling them says nothing of chance
UP, DOWN, ZERO, TRUE, NONE = "↑", "↓", "→ 0", "→ true", ""
WORDS = {UP: "higher is better", DOWN: "lower is better", ZERO: "nearer to 0 is better",
         TRUE: "nearer to the true images’ own value is better"}  # fmt: skip

MEANINGS = {
    "geneval": "Share of images in which the detector finds the objects, counts, colours and places asked for; "
    "the mean of the tags’ means.",
    "dpg-bench": "Share of questions about a long prompt that the judge answers with yes, in percent.",
    "hpsv3": "Mean reward of HPSv3, a model of people’s preferences; its scale has no end.",
    "steps": "Network evaluations with different noise levels for an image.",
    "seconds_per_image": "Wall time of drawing on this machine, without text encoding and scoring.",
}

# Every fidelity measure: what it is called, what is better, and what it says.
MEASURES: dict[str, tuple[str, str, str]] = {
    "texture_frechet": (
        "Texture Fréchet distance", DOWN,
        "Fréchet distance of patches minus their 3×3 blur, where a decoder’s blur shows; 0 is equal.",
    ),
    "patch_frechet": ("Patch Fréchet distance", DOWN, "Fréchet distance of patches of pixels; 0 is equal."),
    "spectrum_all": (
        "Spectrum error (decades)", DOWN,
        "Mean absolute log10 ratio of the luma’s power spectrum to the true images’, over all radii.",
    ),
    "spectrum_high": (
        "High band (decades)", ZERO,
        "The same ratio, signed, over the upper half of the radii: below 0 means blur, above 0 noise.",
    ),
    "high_band_share": (
        "Share of high-band energy", TRUE, "Energy of the luma at the upper half of the radii, over all but the mean’s."
    ),
    "blockiness": (
        "Patch-grid ratio, first differences", TRUE,
        "Mean absolute luma step across the borders of the patch grid over that elsewhere; 1 means no visible grid.",
    ),
    "blockiness_second": (
        "Patch-grid ratio, second differences", TRUE,
        "The same of second differences, as Iris-3B publishes it.",
    ),
    "grain": ("Grain", TRUE, "Median deviation of the luma minus its 3×3 blur, in units of the pixel range."),
    "colour_mean_error": ("Colour mean error", DOWN, "Largest difference of a colour’s mean from the true images’."),
    "colour_std_error": ("Colour spread error", DOWN, "Largest difference of a colour’s standard deviation."),
    "fid": ("FID, patch features", DOWN, "Fréchet distance of images’ patch statistics; for small images."),
    "kid": ("KID, patch features", DOWN, "Kernel distance of the same; unbiased, so that it may fall below 0."),
    "precision": ("Precision, patch features", UP, "Share of the images within the true set’s manifold."),
    "recall": ("Recall, patch features", UP, "Share of the true set within the images’ manifold."),
    "inception_fid": ("FID", DOWN, "Fréchet distance of Inception features; falls with the number of images."),
    "patch_fid": ("Patch-FID, crops", DOWN, "FID of crops at full resolution: texture, not composition."),
    "inception_kid": ("KID", DOWN, "Kernel distance of Inception features; unbiased."),
    "inception_precision": ("Precision, Inception", UP, "Share of the images within the true set’s manifold."),
    "inception_recall": ("Recall, Inception", UP, "Share of the true set within the images’ manifold."),
    "clip_score": ("CLIP score", UP, "100 × the cosine of image and prompt in CLIP ViT-L/14."),
    "lpips_reconstruction": ("LPIPS of the reconstruction", DOWN, "Of true images behind the base’s VAE; 0 is equal."),
    "psnr_reconstruction": ("PSNR of the reconstruction (dB)", UP, "Of true images behind the base’s VAE."),
    "lpips_to_first": ("LPIPS to the first model", NONE, "How far an image is from the first model’s of one seed."),
    "psnr_to_first": ("PSNR to the first model (dB)", NONE, "How near an image is to the first model’s of one seed."),
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A score in [0, 1] with its interval and the detector's ceiling, to draw."""

    score: float
    low: float | None
    high: float | None
    ceiling: float | None
    label: str


@dataclass(frozen=True)
class Cell:
    """One model's figure: ``text``, its interval ``span``, a ``note`` below, a ``bar``; ``best``: to print bold."""

    text: str
    span: str = ""
    note: str = ""
    bar: Bar | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the summary: one cell a model, then the VAE's and the true images' own value.

    ``kind`` is overall, part, measure, or group (a heading without cells). ``better`` is an arrow of `WORDS`,
    ``meaning`` the definition, ``number`` that of its footnote.
    """

    kind: str
    label: str
    cells: tuple[Cell, ...] = ()
    vae: str = ""
    true: str = ""
    better: str = NONE
    meaning: str = ""
    number: int = 0


def get(tree: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def model_names(report: Report) -> list[str]:
    """The models of a report, a run's own first, in the order of its stages."""
    found = report.get("models") or {}
    return [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]


def score_of(value: Any, top: float | None = 1.0) -> str:
    """A score with as many decimals as its scale deserves, so that columns line up."""
    found = finite(value)
    return "–" if found is None else f"{found:.{3 if top == 1.0 else 2}f}".replace("-", "−")


def summary(report: Report) -> list[Row]:
    """Every suite's scores, the fidelity measures and the cost; rows with a definition are numbered."""
    names = model_names(report)
    if not names:
        return []
    rows = [row for suite in KEYS for row in _suite_rows(report, names, suite)] + _fidelity_rows(report, names)
    rows.append(Row("group", "Cost"))
    for key, label in (("steps", "Sampling steps"), ("seconds_per_image", "Seconds per image")):
        cells = tuple(Cell(number(get(report, "models", name, key))) for name in names)
        rows.append(Row("measure", label, cells, better=DOWN, meaning=MEANINGS[key]))
    count = 0
    for index, row in enumerate(rows):
        if row.meaning:
            count += 1
            rows[index] = replace(row, number=count)
    return rows


def _suite_rows(report: Report, names: list[str], suite: str) -> list[Row]:
    key, top = KEYS[suite], TOPS.get(suite)
    found = {name: get(report, "models", name, key) or {} for name in names}
    if not any(found.values()):
        return []
    ceiling = finite(report.get("detector_ceiling")) if suite == "geneval" else None
    whole = {name: found[name].get("overall") or {} for name in names}
    best = leader(whole, lambda ours, theirs: _gap(report, ours, theirs, key))
    cells = []
    for name in names:
        cell = whole[name]
        if not cell:
            cells.append(Cell("–", note="partial: no overall"))
            continue
        bar = _bar(cell, top, ceiling)
        cells.append(Cell(score_of(cell.get("score"), top), _span(cell, top), _paired(report, name, key, top), bar,
                          name == best))  # fmt: skip
    true = score_of(ceiling, top) if ceiling is not None else ""
    rows = [
        Row("overall", f"{LABELS[suite]}, overall", tuple(cells), true=true, better=UP, meaning=MEANINGS[suite])
    ]  # fmt: skip
    for tag in dict.fromkeys(tag for name in names for tag in _groups(found[name])):
        parts = {name: _groups(found[name]).get(tag) or {} for name in names}
        best = leader(parts)
        shown = tuple(
            Cell(score_of(part.get("score"), top), _span(part, top), best=name == best) for name, part in parts.items()
        )
        rows.append(Row("part", tag.replace("_", " "), shown, better=UP))
    return rows


def leader(cells: Mapping[str, Mapping[str, Any]], gap: Any = lambda ours, theirs: None) -> str | None:
    """The model that beats every other by more than chance; None where there is none.

    Of two models the paired difference decides, ``gap(ours, theirs)`` -> (low, high) or None; without one, intervals
    that do not overlap. An interval over fewer than ``FEW`` prompts decides nothing.
    """
    judged = {name: cell for name, cell in cells.items() if finite(cell.get("score")) is not None}
    if len(judged) < 2 or any(cell.get("prompts", FEW) < FEW for cell in judged.values()):
        return None
    best = max(judged, key=lambda name: judged[name]["score"])

    def beaten(other: str) -> bool:
        paired = gap(best, other)
        if paired is not None:
            return bool(paired[0] > 0)
        low, high = finite(judged[best].get("low")), finite(judged[other].get("high"))
        return low is not None and high is not None and low > high

    return best if all(beaten(name) for name in judged if name != best) else None


def _gap(report: Report, ours: str, theirs: str, key: str) -> tuple[float, float] | None:
    """The interval of our score minus theirs, where the report has that pair either way round."""
    for pair, sign in ((f"{ours}-{theirs}", 1), (f"{theirs}-{ours}", -1)):
        found = get(report, "paired", pair, key) or {}
        ends = [finite(found.get(end)) for end in ("low", "high")]
        if ends[0] is not None and ends[1] is not None:
            low, high = sorted(sign * end for end in ends if end is not None)
            return low, high
    return None


def _bar(cell: Mapping[str, Any], top: float | None, ceiling: float | None) -> Bar | None:
    score, low, high = (finite(cell.get(key)) for key in ("score", "low", "high"))
    if top is None or score is None:
        return None
    low, high = (None if end is None else end / top for end in (low, high))
    return Bar(score / top, low, high, ceiling, f"{score_of(score, top)}, 95 % interval {_span(cell, top)}")


def _groups(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = figures.get("tags") or figures.get("groups") or {}
    return found


def _span(cell: Mapping[str, Any], top: float | None) -> str:
    """``[low, high]``, or nothing if the interval is missing."""
    if finite(cell.get("low")) is None or finite(cell.get("high")) is None:
        return ""
    return f"[{score_of(cell['low'], top)}, {score_of(cell['high'], top)}]"


def _paired(report: Report, name: str, key: str, top: float | None) -> str:
    for pair, found in (report.get("paired") or {}).items():
        ours, _, theirs = pair.rpartition("-")
        if ours == name and isinstance(found, Mapping) and key in found:
            return f"vs {theirs} {score_of(found[key].get('difference'), top)} {_span(found[key], top)}"
    return ""


def _fidelity_rows(report: Report, names: list[str]) -> list[Row]:
    vae, real = (get(report, "fidelity_ceiling", key) or {} for key in ("vae", "real"))
    values = {name: get(report, "models", name, "fidelity") or {} for name in names}
    known = list(dict.fromkeys(key for name in names for key in (*values[name], *(vae if values[name] else ()))))
    rows = [Row("group", "Fidelity to true images")] if known else []
    for key in [key for key in MEASURES if key in known] + [key for key in known if key not in MEASURES]:
        label, better, meaning = MEASURES.get(key, (key.replace("_", " "), NONE, ""))
        cells = tuple(Cell(number(values[name].get(key))) for name in names)
        alone, true = (number(one[key]) if key in one else "" for one in (vae, real))
        rows.append(Row("measure", label, cells, alone, true, better, meaning))
    return rows
