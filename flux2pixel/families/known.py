"""The published bases: Hub id, licence, size, how they are sampled, and the configurations published with each.

They let a plan be made, and a recipe be checked, before anything is downloaded. A folder's own files always win over
this table. A test builds each transformer without storage and compares every count here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flux2pixel.families import registry
from flux2pixel.families.published import PUBLISHED


@dataclass(frozen=True)
class Defaults:
    """How a base's publishers sample it: ``guidance`` as an ordinary scale (1 is none), on the base's own scheduler."""

    steps: int
    guidance: float
    source: str
    height: int = 1024
    width: int = 1024


@dataclass(frozen=True)
class Known:
    """One published base.

    ``rank`` r and ``patch`` p give the pixel token's width D = 3 p p; ``parameters`` are the transformer's;
    ``configs`` are its published configurations by part; ``undistilled`` names the alias to prefer over a distilled
    checkpoint; ``refused`` says why one cannot be converted; ``unseen`` are parts whose published file was not seen.
    """

    hub: str
    licence: str
    parameters: int
    rank: int
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Defaults
    gated: bool = False
    undistilled: str = ""
    refused: str = ""
    unseen: tuple[str, ...] = ()
    patch: int = 16

    @property
    def transformer(self) -> Mapping[str, Any]:
        """The published configuration of the transformer."""
        return self.configs["transformer"]

    @property
    def transformer_class(self) -> str:
        """The stock class of the transformer."""
        return str(self.transformer["_class_name"])


_APACHE, _BFL, _STABILITY = "Apache-2.0", "FLUX Non-Commercial", "Stability Community"
_KOMMUNITY, _FLOW_MAP = "FLUX Kommunity", "a flow map; its output is no velocity at one noise level"

# One table, with sources. Guidance is the ordinary classifier-free scale, or what a network takes as a number.
DEFAULTS: dict[str, Defaults] = {
    "flux2-klein-4b": Defaults(50, 4.0, "diffusers Flux2KleinPipeline's defaults; model card of the base"),
    "flux2-klein-4b-distilled": Defaults(4, 1.0, "model card: 4 steps, guidance_scale 1.0"),
    "flux2-klein-9b": Defaults(50, 4.0, "diffusers Flux2KleinPipeline's defaults; model card of the base"),
    "flux2-klein-9b-distilled": Defaults(4, 1.0, "model card: 4 steps, guidance_scale 1.0"),
    "flux2-dev": Defaults(50, 4.0, "diffusers Flux2Pipeline's defaults (embedded guidance)"),
    "flux1-dev": Defaults(28, 3.5, "diffusers FluxPipeline's defaults (embedded guidance)"),
    "flux1-schnell": Defaults(4, 1.0, "model card: 4 steps, no guidance"),
    "sd3.5-medium": Defaults(28, 7.0, "diffusers StableDiffusion3Pipeline's defaults"),
    "sd3.5-large": Defaults(28, 7.0, "diffusers StableDiffusion3Pipeline's defaults"),
    "qwen-image": Defaults(50, 4.0, "diffusers QwenImagePipeline's defaults (true_cfg_scale)"),
    "qwen-image-2512": Defaults(50, 4.0, "diffusers QwenImagePipeline's defaults (true_cfg_scale)"),
    "z-image": Defaults(50, 5.0, "model card: 50 steps, guidance_scale 4, which the pipeline adds to 1"),
    "z-image-turbo": Defaults(8, 1.0, "model card: 8 forwards, guidance_scale 0, which is none"),
    "flux3-klein": Defaults(50, 3.5, "diffusers Flux3ModularPipeline's guider; the model's README says 4"),
    "flux3-klein-distilled": Defaults(16, 1.0, "README: 16 steps, no guidance"),
}


def _known(alias: str, hub: str, licence: str, parameters: int, rank: int, **more: Any) -> tuple[str, Known]:
    return alias, Known(hub, licence, parameters, rank, PUBLISHED[alias], DEFAULTS[alias], **more)


_BLACK_FOREST, _STABLE = "black-forest-labs", "stabilityai/stable-diffusion-3.5"
_4B, _9B, _DEV = 3_875_544_576, 9_078_581_248, 32_223_281_152

KNOWN: dict[str, Known] = dict(
    [
        _known("flux2-klein-4b", f"{_BLACK_FOREST}/FLUX.2-klein-base-4B", _APACHE, _4B, 128),
        _known(
            "flux2-klein-4b-distilled",
            f"{_BLACK_FOREST}/FLUX.2-klein-4B",
            _APACHE,
            _4B,
            128,
            undistilled="flux2-klein-4b",
        ),
        _known(
            "flux2-klein-9b",
            f"{_BLACK_FOREST}/FLUX.2-klein-base-9B",
            _BFL,
            _9B,
            128,
            gated=True,
            unseen=("text_encoder",),
        ),
        _known(
            "flux2-klein-9b-distilled",
            f"{_BLACK_FOREST}/FLUX.2-klein-9B",
            _BFL,
            _9B,
            128,
            gated=True,
            undistilled="flux2-klein-9b",
            unseen=("text_encoder",),
        ),
        _known("flux2-dev", f"{_BLACK_FOREST}/FLUX.2-dev", _BFL, _DEV, 128, gated=True),
        _known("flux1-dev", f"{_BLACK_FOREST}/FLUX.1-dev", _BFL, 11_901_408_320, 64, gated=True),
        _known(
            "flux1-schnell",
            f"{_BLACK_FOREST}/FLUX.1-schnell",
            _APACHE,
            11_891_178_560,
            64,
            gated=True,
            undistilled="flux1-dev",
        ),
        _known("sd3.5-medium", f"{_STABLE}-medium", _STABILITY, 2_243_171_520, 64, gated=True),
        _known("sd3.5-large", f"{_STABLE}-large", _STABILITY, 8_056_627_520, 64, gated=True),
        _known("qwen-image", "Qwen/Qwen-Image", _APACHE, 20_430_401_088, 64, unseen=("text_encoder",)),
        _known("qwen-image-2512", "Qwen/Qwen-Image-2512", _APACHE, 20_430_401_088, 64, unseen=("text_encoder",)),
        _known("z-image", "Tongyi-MAI/Z-Image", _APACHE, 6_154_908_736, 64),
        _known("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", _APACHE, 6_154_908_736, 64, undistilled="z-image"),
        _known(
            "flux3-klein",
            f"{_BLACK_FOREST}/flux-3-image-klein-base",
            _KOMMUNITY,
            5_538_458_368,
            128,
            gated=True,
            unseen=("transformer", "text_encoder"),
        ),
        _known(
            "flux3-klein-distilled",
            f"{_BLACK_FOREST}/flux-3-image-klein",
            _KOMMUNITY,
            5_548_681_984,
            128,
            gated=True,
            undistilled="flux3-klein",
            refused=_FLOW_MAP,
            unseen=("transformer", "text_encoder"),
        ),
    ]
)


def base_names() -> list[str]:
    """Every alias of a base: those that come with a package, and those on the Hub."""
    return [*registry.names(), *KNOWN]


def known_by_config(transformer: Mapping[str, Any], distilled: bool) -> Known | None:
    """The published base that a transformer's configuration is of, whatever folder it lies in; None for another."""
    for known in KNOWN.values():
        published = known.configs.get("model_index", {}).get("is_distilled", False) or known.undistilled != ""
        if bool(published) == distilled and all(transformer.get(k) == v for k, v in known.transformer.items()):
            return known
    return None
