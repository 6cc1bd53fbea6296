"""Sample images of fixed prompts and seeds as the training goes, and one sheet that shows them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.families.base import Conditioning, take
from flux2pixel.finetune.prepare import Source
from flux2pixel.models.model import PixelModel, seeded_noise, to_bytes
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import files


def sample_model(source: Source, flow: AsymFlow, recipe: Recipe) -> PixelModel:
    """What draws with a network in training, on the device of ``flow``."""
    # What a finetune teaches has no latent counterpart, so nothing is lost by keeping its colours on the screen.
    sampler = source.stored.sampler.changed({"gamut_clamp": True}).changed(recipe.sample)
    return PixelModel(source.base, sampler, source.stored.codec, flow=flow)


class Samples:
    """Draws the prompts whose embeddings are ``text``, that of the empty prompt last, with a network in training."""

    def __init__(
        self,
        folder: Path,
        model: PixelModel,
        text: Conditioning,
        size: tuple[int, int],
        seed: int,
        device: torch.device,
    ):
        self.folder, self.model, self.size = folder, model, size
        self.conditioning: Conditioning = {
            name: (value.float() if value.is_floating_point() else value).to(device) for name, value in text.items()
        }
        count = len(next(iter(text.values()))) - 1
        tokens = (size[0] // model.codec.patch) * (size[1] // model.codec.patch)
        self.noise = seeded_noise([(seed, i) for i in range(count)], tokens, 3 * model.codec.patch**2).to(device)

    @torch.no_grad()
    def __call__(self, network: Any) -> np.ndarray:
        """Images (prompts, H, W, 3) uint8, one prompt at a time. Every process must call it."""
        training = network.training
        network.eval()
        model = self.model.with_network(network)
        empty = take(self.conditioning, slice(-1, None))
        images = [
            to_bytes(model(take(self.conditioning, slice(i, i + 1)), empty, noise[None], self.size).cpu())
            for i, noise in enumerate(self.noise)
        ]
        network.train(training)
        return np.concatenate(images)

    def write(self, images: np.ndarray, step: int) -> Path:
        """Write the row of images of ``step``, and the contact sheet of all rows so far; returns the row's path."""
        from PIL import Image

        path = self.folder / f"step-{step:08d}.png"
        row = Image.fromarray(np.concatenate(list(images), axis=1))
        files.write(path, lambda temporary: row.save(temporary, format="png"))
        contact_sheet(self.folder)
        return path

    def forget_after(self, step: int) -> None:
        """Delete the rows of steps after ``step``: they are from before a kill."""
        for path in self.folder.glob("step-*.png"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()


def contact_sheet(folder: Path, most: int = 20) -> Path:
    """``contact.png``: one row a step, at most ``most`` evenly chosen ones; returns its path."""
    from PIL import Image, ImageDraw

    paths = sorted(folder.glob("step-*.png"))
    chosen = [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, min(most, len(paths)))})]
    rows = [Image.open(path).convert("RGB") for path in chosen]
    scale = max(1, 64 // rows[0].height)  # a miniature's pixels are shown as squares
    rows = [row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST) for row in rows]
    margin = 64
    sheet = Image.new("RGB", (margin + rows[0].width, sum(row.height for row in rows)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for path, row in zip(chosen, rows, strict=True):
        draw.text((4, top + row.height // 2 - 5), str(int(path.stem.removeprefix("step-"))), fill="black")
        sheet.paste(row, (margin, top))
        top += row.height
    files.write(folder / "contact.png", lambda temporary: sheet.save(temporary, format="png"))
    return folder / "contact.png"
