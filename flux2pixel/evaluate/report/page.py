"""The report's small parts: text, numbers, pictures and charts as HTML strings. No request leaves the page."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def text(value: object) -> str:
    """Any value as escaped HTML text, safe in an attribute as well."""
    return html.escape(str(value), quote=True)


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def number(value: Any, digits: int = 3) -> str:
    """A number to ``digits`` significant figures, an en dash if there is none; other values as escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return text(value)
    if isinstance(value, list | tuple):
        return ", ".join(number(item, digits) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{text(key)} {number(item, digits)}" for key, item in value.items())
    found = finite(value)
    if found is None:
        return "–"
    if found == int(found) and abs(found) < 1e9:
        return f"{int(found)}"
    if abs(found) >= 1000 and abs(found) < 1e9:
        return f"{found:.0f}"
    if abs(found) < 1e-5 or abs(found) >= 1e9:
        return f"{found:.{digits - 1}e}".replace("-", "−")
    if abs(found) < 1.0:
        places = digits - 1 - math.floor(math.log10(abs(found)))
        return f"{found:.{places}f}".replace("-", "−")
    return f"{found:.{digits}g}".replace("-", "−")


def data_uri(image: Image.Image) -> str:
    """A picture as a lossless PNG data URI."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def interval_bar(
    interval: tuple[float | None, float | None, float | None], css_class: str, top: float | None, label: str
) -> str:
    """A score in [0, 1] with its interval, (score, low, high), as a bar with a whisker, and the ceiling as a tick."""
    middle, lower, upper = interval
    if middle is None:
        return ""
    marks = f'<rect class="track" width="200" height="6" y="4"/><rect width="{200 * middle:.1f}" height="6" y="4"/>'
    if lower is not None and upper is not None:
        marks += f'<path class="whisker" d="M{200 * lower:.1f} 7H{200 * upper:.1f}M{200 * lower:.1f} 2v10'
        marks += f'M{200 * upper:.1f} 2v10"/>'
    if top is not None:
        marks += f'<path class="ceiling" d="M{200 * top:.1f} 0v14"/>'
    return f'<svg class="bar {css_class}" viewBox="-1 0 202 14" role="img" aria-label="{text(label)}">{marks}</svg>'


def closest(values: Sequence[Any], target: float | None) -> list[int]:
    """Indices of the values nearest to ``target``; none if there is nothing to compare."""
    gaps: dict[int, float] = {}
    for index, value in enumerate(values):
        found = finite(value)
        if found is not None and target is not None:
            gaps[index] = abs(found - target)
    return [index for index, gap in gaps.items() if gap <= min(gaps.values())] if len(gaps) > 1 else []


def table_row(label: str, cells: Sequence[str], best: Sequence[int], ceilings: Sequence[str]) -> str:
    """A table row: label (escaped here), one HTML cell for each model, those in ``best`` bold, then the ceilings."""
    body = "".join(f'<td class="{"best" if index in best else ""}">{cell}</td>' for index, cell in enumerate(cells))
    return f"<tr><th>{text(label)}</th>{body}{''.join(f'<td>{cell}</td>' for cell in ceilings)}</tr>"


def option(value: str, label: str) -> str:
    """One choice of a select box."""
    return f'<option value="{text(value)}">{text(label)}</option>'


def line_chart(
    points: Sequence[tuple[float, float]],
    title: str,
    x_label: str,
    log: bool = False,
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """A line of ``(x, y)`` points as SVG; ``log`` takes log10 of y (points at or below 0 are left out).

    ``mark`` draws a vertical line at that x. Fewer than two points give an empty string.
    """
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    if len(kept) < 2:
        return ""
    width, height, left, right, top, bottom = 560.0, 230.0, 58.0, 12.0, 12.0, 38.0
    xs = [x for x, _ in kept]
    ys = [math.log10(y) if log else y for _, y in kept]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if y_high - y_low < 1e-12:
        y_low, y_high = y_low - 0.5, y_high + 0.5
    x_span, y_span = (x_high - x_low) or 1.0, y_high - y_low

    def to_x(value: float) -> float:
        return left + (value - x_low) / x_span * (width - left - right)

    def to_y(value: float) -> float:
        return height - bottom - (value - y_low) / y_span * (height - top - bottom)

    parts: list[str] = []
    for tick in _ticks(y_low, y_high, whole=log and y_span >= 2):
        label = f"{10**tick:.1e}" if log and tick != int(tick) else (f"1e{int(tick)}" if log else f"{tick:g}")
        parts.append(f'<path class="rule" d="M{left} {to_y(tick):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 8}" y="{to_y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(x_low, x_high, whole=x_span >= 4):
        parts.append(f'<text x="{to_x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    if mark is not None and x_low <= mark <= x_high:
        anchor, shift = ("start", 5) if to_x(mark) < width * 0.7 else ("end", -5)
        parts.append(f'<path class="mark" d="M{to_x(mark):.1f} {top}V{height - bottom}"/>')
        place = f'x="{to_x(mark) + shift:.1f}" y="{top + 12}" text-anchor="{anchor}"'
        parts.append(f"<text {place}>{text(mark_label)}</text>")
    path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in zip(xs, ys, strict=True))
    parts.append(f'<path class="line" d="M{path}"/>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">{text(x_label)}</text>')
    drawing = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
    )
    return f'<figure class="chart"><figcaption>{text(title)}</figcaption>{drawing}</figure>'


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round values between ``low`` and ``high``."""
    raw = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """Pairs of name and value as a definition list; missing values are left out."""
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{number(value)}</dd></div>" for name, value in rows if value is not None
    )
    return f'<dl class="facts">{shown}</dl>' if shown else ""
