"""Self-contained HTML pages: one frame and one style sheet for every verb's report, and charts as inline SVG.

A page is a Jinja2 template that extends ``page.html``; everything put into it is escaped. It holds all it shows and
asks nothing of a network.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2pixel.runtime import files

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL import Image

# A second lock on the promise that nothing is asked of a network: images are in the page, or files beside it.
POLICY = "default-src 'none'; img-src data: blob: file: 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560.0, 250.0, 62.0, 14.0, 12.0, 40.0  # of a chart, and its margins


def write(path: Path, template: Path, **context: Any) -> None:
    """Render ``template`` with ``context`` and write it at ``path``, whole or not at all.

    The page is streamed: a generator in ``context`` may hold more than memory does. Raises Flux2PixelError if the file
    cannot be written.
    """
    import jinja2

    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader([template.parent, here])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters["number"] = number
    environment.globals["policy"] = POLICY
    stream = environment.get_template(template.name).stream(**context)
    stream.enable_buffering(16)
    files.write(path, lambda temporary: _dump(stream, temporary))


def _dump(stream: Iterable[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(stream)


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is missing, not a number or not finite."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def number(value: Any, digits: int = 3) -> str:
    """A number to ``digits`` significant figures, an en dash if there is none; other values as text."""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(number(item, digits) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number(item, digits)}" for key, item in value.items())
    found = finite(value)
    if found is None:
        return "–"
    size = abs(found)
    if found == int(found) and size < 1e9:
        shown = f"{int(found)}"
    elif size < 1e-5 or size >= 1e9:
        shown = f"{found:.{digits - 1}e}"
    elif size < 1.0:
        shown = f"{found:.{digits - 1 - math.floor(math.log10(size))}f}"
    else:
        shown = f"{found:.0f}" if size >= 1000 else f"{found:.{digits}g}"
    return shown.replace("-", "−")


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted name and a value."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        found += flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def data_uri(image: Image.Image) -> str:
    """A picture as a lossless PNG data URI."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Line:
    """One series of a chart: its name in the legend and its points ``(x, y)``; ``dots`` marks each of them."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    x_log: bool = False,
    y_log: bool = False,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Lines as a figure of inline SVG, empty where no line has a point.

    A log axis leaves out points at or below 0. ``mark`` draws a labelled vertical line at its x.
    """
    from markupsafe import Markup, escape

    drawn = [(line, _kept(line.points, x_log, y_log)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points and (line.dots or len(points) > 1)]
    if not drawn:
        return Markup("")
    x, x_ticks = _axis([p[0] for _, points in drawn for p in points], x_log, LEFT, WIDTH - RIGHT)
    y, y_ticks = _axis([p[1] for _, points in drawn for p in points], y_log, HEIGHT - BOTTOM, TOP)
    parts = [f'<path class="rule" d="M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}"/>' for t, _ in y_ticks]
    parts += [f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{s}</text>' for t, s in y_ticks]
    parts += [f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{s}</text>' for t, s in x_ticks]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    if mark is not None and (at := _kept([(mark[0], 1.0)], x_log, False)):
        place = x(at[0][0])
        if LEFT <= place <= WIDTH - RIGHT:
            anchor, shift = ("start", 5) if place < WIDTH * 0.7 else ("end", -5)
            parts.append(f'<path class="mark" d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text x="{place + shift:.1f}" y="{TOP + 12}" text-anchor="{anchor}">{escape(mark[1])}</text>'
            )
    for index, (line, points) in enumerate(drawn):
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        if len(points) > 1:
            parts.append(f'<path class="line series-{index}" d="M{path}"/>')
        if line.dots:
            parts += [f'<circle class="series-{index}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>' for a, b in points]
    names = ""
    if len(drawn) > 1:
        keys = (f'<span class="key series-{i}">{escape(line.name)}</span>' for i, (line, _) in enumerate(drawn))
        names = f'<p class="legend">{"".join(keys)}</p>'
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{names}'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _kept(points: Iterable[tuple[float, float]], x_log: bool, y_log: bool) -> list[tuple[float, float]]:
    """Finite points, logarithms taken."""
    found = []
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_log) and (y > 0 or not y_log):
            found.append((math.log10(x) if x_log else x, math.log10(y) if y_log else y))
    return found


def _axis(values: Sequence[float], log: bool, start: float, end: float) -> tuple[Any, list[tuple[float, str]]]:
    """The place of a value between ``start`` and ``end``, and the ticks with their labels."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    whole = log and high - low >= 2
    return place, [(tick, _label(tick, log)) for tick in _ticks(low, high, whole)]


def _label(tick: float, log: bool) -> str:
    if not log:
        return f"{tick:g}"
    return f"{10**tick:g}" if -3 <= tick <= 4 else f"{10**tick:.0e}"


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Three to seven round values between ``low`` and ``high``."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]
