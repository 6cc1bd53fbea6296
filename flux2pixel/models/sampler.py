"""How a model draws: the base's published defaults, the model's folder and what the user wrote, resolved."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flux2pixel.asymflow.schedule import REFERENCE_SIDE
from flux2pixel.families.known import known_by_config
from flux2pixel.models.base import Base
from flux2pixel.runtime.errors import UsageError

# Steps and guidance of a checkpoint of no known base, by how it is guided.
UNKNOWN = {"cfg": (50, 4.0), "embedded": (50, 3.5), "none": (4, 1.0)}


@dataclass(frozen=True)
class Sampler:
    """Settings of a drawing; every field is resolved.

    ``shift`` is a factor of the pixel noise level at 1024 x 1024 (see :mod:`flux2pixel.asymflow.schedule`); None, of a
    latent base alone, is the schedule of its own pipeline. ``height`` and ``width``, pixels, are those of an image
    whose size nobody named. ``orthogonal`` and ``gamut_clamp`` are the pixel model's alone.
    """

    steps: int
    guidance: float
    shift: float | None = None
    solver: str = "euler"
    orthogonal: bool = False
    gamut_clamp: bool = False
    height: int = REFERENCE_SIDE
    width: int = REFERENCE_SIDE

    def changed(self, written: Any) -> Sampler:
        """With what ``written``, a ``recipe.Sample`` or a mapping, sets: a field that is None says nothing."""
        table = written if isinstance(written, Mapping) else _written(written)
        names = {field.name for field in fields(self)}
        return replace(self, **{name: value for name, value in table.items() if name in names and value is not None})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written into ``asymflow.json``."""
        return asdict(self)


def base_sampler(base: Base) -> Sampler:
    """The settings of a latent base: its own pipeline's schedule, and the published steps, guidance and size.

    What a folder's own ``flux2pixel.toml`` says under ``[sample]`` comes first, then the table of known bases, found by
    the transformer's configuration; a checkpoint of no known base takes what others of its kind do.
    """
    path = base.folder / "flux2pixel.toml"
    own = tomllib.loads(path.read_text(encoding="utf-8")).get("sample", {}) if path.is_file() else {}
    known = known_by_config(base.facts["transformer"], base.distilled)
    steps, guidance = (known.defaults.steps, known.defaults.guidance) if known else UNKNOWN[base.guidance]
    return Sampler(**({"steps": steps, "guidance": guidance} | own))


def of_conversion(base: Base, scale: float) -> Sampler:
    """The settings of a model that was converted and nothing more: it draws what its base draws, on the matched grid.

    The shift is read off the base's own schedule for its own size, sigma = shift(tau, s), and stated at 1024 x 1024.
    """
    own = base_sampler(base)
    steps = own.steps + own.steps % 2
    # A shift of a has a / (1 + a) halfway; one step more moves a dynamic schedule a little.
    middle = float(base.time_grid(steps, own.height, own.width)[steps // 2])
    latent = middle / (1 - middle)
    return replace(own, shift=latent * scale * REFERENCE_SIDE / (own.height * own.width) ** 0.5)


def check_guidance(base: Base, sampler: Sampler, written: Any) -> Sampler:
    """The sampler of a distilled base, without guidance. Raises UsageError if the user asked for some."""
    if base.guidance != "none" or sampler.guidance == 1:
        return sampler
    asked = written.get("guidance") if isinstance(written, Mapping) else getattr(written, "guidance", None)
    if asked not in (None, 1):
        raise UsageError(f"sample.guidance = {asked:g}: {base.folder} is distilled and takes no guidance; leave it out")
    return replace(sampler, guidance=1.0)


def _written(sample: Any) -> dict[str, Any]:
    # Until recipe.Sample tells what was written: what differs from its defaults.
    plain = type(sample)()
    return {name: value for name, value in asdict(sample).items() if value != getattr(plain, name)}
