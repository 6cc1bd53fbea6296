"""Sample images of fixed prompts and seeds as the training goes, and one sheet that shows them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2pixel.families.base import Conditioning, take
from flux2pixel.models.base import Base
from flux2pixel.models.model import PixelModel, seeded_noise, to_bytes
from flux2pixel.runtime import files

TEXT = "prompts.safetensors"


def encode_prompts(base: Base, prompts: tuple[str, ...], folder: Path) -> None:
    """Embed the prompts, and the empty one last, into ``folder``, so that no training process needs the encoder."""
    from safetensors.torch import save_file

    conditioning = {name: value.contiguous() for name, value in base.text([*prompts, ""]).items()}
    files.write(folder / TEXT, lambda temporary: save_file(conditioning, temporary))


class Samples:
    """Draws the prompts of :func:`encode_prompts` with a network in training."""

    def __init__(self, folder: Path, model: PixelModel, size: tuple[int, int], seed: int, device: torch.device):
        tensors, _ = files.read_tensors(folder / TEXT)
        self.folder, self.model, self.size = folder, model, size
        self.conditioning: Conditioning = {name: value.to(device) for name, value in tensors.items()}
        count = len(next(iter(tensors.values()))) - 1
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

    def write(self, images: np.ndarray, step: int) -> None:
        """Write the row of images of ``step``, and the contact sheet of all rows so far."""
        from PIL import Image

        path = self.folder / f"step-{step:08d}.png"
        row = Image.fromarray(np.concatenate(list(images), axis=1))
        files.write(path, lambda temporary: row.save(temporary, format="png"))
        contact_sheet(self.folder)

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
