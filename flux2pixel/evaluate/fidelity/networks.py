"""The networks of the fidelity measures, from local weights alone: Inception for FID and its kin, CLIP, LPIPS.

    n  images    H x W  pixels

Each opens what ``flux2pixel eval --suite fidelity --fetch`` puts into the assets folder; `absent` says in one line what
to fetch. Images are (H, W, 3) uint8.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flux2pixel.evaluate.assets.fetch import ALEXNET, ALEXNET_FILE, CLIP_FILE, INCEPTION, INCEPTION_FILE, Source
from flux2pixel.evaluate.precision import exact_float32
from flux2pixel.evaluate.suite import Rgb
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError

Features = NDArray[np.float64]
FETCH = "flux2pixel eval --suite fidelity --fetch"
Extract = Callable[[Sequence[Rgb]], Features]  # images of one size -> (n, d)
Distance = Callable[[Sequence[Rgb], Sequence[Rgb]], list[float]]


@dataclass(frozen=True)
class Networks:
    """Those whose weights are there; None for the others."""

    inception: Extract | None = None
    clip: Callable[[Sequence[Rgb], Sequence[str]], list[float]] | None = None
    lpips: Distance | None = None


def absent(assets: Path) -> dict[str, str]:
    """One line for each network that cannot be opened, by its name in `Networks`; opens none."""
    found = {}
    for name, path, package, extra, what in (
        ("inception", assets / INCEPTION_FILE, "torch_fidelity", "eval", "FID, KID, precision, recall and patch-FID"),
        ("clip", assets / CLIP_FILE, "open_clip", "", "the CLIP score"),
        ("lpips", assets / ALEXNET_FILE, "lpips", "train", "LPIPS"),
    ):
        if importlib.util.find_spec(package) is None:
            found[name] = f"{what}: the package {package} is absent; pip install 'flux2pixel[{extra}]'"
        elif not path.is_file():
            found[name] = f"{what}: no {path}; `{FETCH}` gets it"
    return found


def open_networks(assets: Path, device: torch.device) -> Networks:
    """Open what is there. Raises Flux2PixelError for weights that are not what they should be."""
    lost = absent(assets)
    return Networks(
        None if "inception" in lost else Inception(assets, device),
        None if "clip" in lost else ClipScore(assets, device),
        None if "lpips" in lost else Lpips(assets, device),
    )


def checked(path: Path, source: Source) -> Path:
    """The path of fetched weights. Raises Flux2PixelError if they are not what is pinned."""
    if not (found := files.digest(path)).startswith(source.sha256):
        raise Flux2PixelError(f"{path}: sha256 {found[:8]}..., want {source.sha256}...; delete it and fetch again")
    return path


def _stack(images: Sequence[Rgb], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


class Inception:
    """The 2048 features of TensorFlow's Inception of 2015, as torch-fidelity carries it over: FID's own network.

    Images are taken at their own size and scaled to 299 pixels as TensorFlow 1 did.
    """

    def __init__(self, assets: Path, device: torch.device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = checked(
            assets / INCEPTION_FILE, INCEPTION
        )  # torch-fidelity unpickles it, so its digest is checked first
        self._network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        self._network.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Rgb]) -> Features:
        with exact_float32():
            (found,) = self._network(_stack(images, self._device))
        return np.asarray(found.cpu().double().numpy())


class ClipScore:
    """100 x the cosine of an image and its prompt in CLIP ViT-L/14, at least 0 (Hessel et al., 2021, unweighted).

    Prompts are cut at CLIP's 77 tokens. The weights are those that name GenEval's colours.
    """

    def __init__(self, assets: Path, device: torch.device):
        import open_clip

        from flux2pixel.evaluate.geneval.colors import MODEL, clip_transform
        from flux2pixel.evaluate.open_scorers import clip_model

        self._model, _ = clip_model(assets / CLIP_FILE, str(device))
        self._tokenize, self._device = open_clip.get_tokenizer(MODEL), device
        self._transform = clip_transform(self._model.visual.image_size[0])

    @torch.inference_mode()
    def __call__(self, images: Sequence[Rgb], prompts: Sequence[str]) -> list[float]:
        """One score a pair."""
        batch = torch.stack([self._transform(Image.fromarray(image)) for image in images]).to(self._device)
        with exact_float32():
            seen = self._model.encode_image(batch)
            read = self._model.encode_text(self._tokenize(list(prompts)).to(self._device))
        found: list[float] = (100 * torch.cosine_similarity(seen, read)).clamp(min=0).tolist()
        return found


class Lpips:
    """LPIPS 0.1 on AlexNet, the variant that its authors report distances with (Zhang et al., 2018)."""

    def __init__(self, assets: Path, device: torch.device):
        import lpips

        from flux2pixel.evaluate.assets.convert import read_pickle

        state = read_pickle(checked(assets / ALEXNET_FILE, ALEXNET))
        # pnet_rand keeps torchvision from downloading; the linear layers are in the package.
        with warnings.catch_warnings(action="ignore"):  # of torchvision's, about how lpips calls it
            network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        # slice2.3.weight is features.3.weight of torchvision's class.
        trunk = {key: state[f"features.{key.split('.', 1)[1]}"] for key in network.net.state_dict()}
        network.net.load_state_dict(trunk)
        self._network, self._device = network.to(device).eval().requires_grad_(False), device

    @torch.inference_mode()
    def __call__(self, ours: Sequence[Rgb], theirs: Sequence[Rgb]) -> list[float]:
        """One distance a pair; 0 is equal."""
        with exact_float32():
            pairs = (_stack(images, self._device).float() / 127.5 - 1 for images in (ours, theirs))
            found: list[float] = self._network(*pairs).flatten().tolist()
        return found
