"""The finetune stage: a converted model and images -> a finetuned model."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from flux2pixel import bases, files
from flux2pixel.asymflow import schedule
from flux2pixel.asymflow.pipeline import PixelModel, load_pixel_model
from flux2pixel.bases.base import Base, Conditioning, take
from flux2pixel.errors import Flux2PixelError, UsageError
from flux2pixel.finetune.data import Cache, encode_scenes
from flux2pixel.finetune.ema import PowerEma
from flux2pixel.finetune.loss import flow_matching, variance_reduction
from flux2pixel.progress import bar, say
from flux2pixel.recipe import Recipe, as_dict, dumps

# Scenes apart from those of the base's own training and of the subspace fit.
FIRST_SCENE = 2_000_000


class Trainer:
    """One process, all weights trainable; draws are a function of the step, so that a resumed run repeats them."""

    def __init__(self, recipe: Recipe, model: PixelModel, base: Base, cache: Cache):
        self.recipe, self.settings = recipe, recipe.finetune
        self.model, self.base, self.cache = model, base, cache
        side = math.isqrt(cache.pixels.shape[1])
        self.grid = (side, side)
        self.net = model.transformer.train().requires_grad_(True)
        out = list(self.net.get_submodule(base.pixel_name(base.projections.output)).parameters())
        rest = [p for p in self.net.parameters() if all(p is not q for q in out)]
        self.rates = (self.settings.lr, self.settings.out_projection_lr)
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": out}], lr=self.settings.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.ema = PowerEma(self.net, self.settings.ema_gamma)
        self.step = 0

    def _draw(self) -> tuple[Tensor, Tensor, Conditioning, Tensor, Tensor]:
        """Pixel tokens, latent tokens, text, sigma and noise of this step's batch."""
        generator = Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        count = self.settings.batch
        index = torch.randint(len(self.cache.pixels), (count,), generator=generator)
        rows = self.cache.rows[index].clone()
        rows[torch.rand(count, generator=generator) < self.settings.caption_dropout] = 0
        x0, z0 = self.cache.pixels[index].float(), self.cache.latents[index].float()
        sigma = schedule.draw(count, self.settings.shift, generator)
        return x0, z0, take(self.cache.text, rows), sigma, torch.randn(x0.shape, generator=generator)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _reference(self, x0_low: Tensor, eps: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """The frozen converted model's x0_hat on low-rank tokens, run as the latent base: lift(z - tau v)."""
        flow = self.model.flow
        k, tau = (c.view(-1, 1, 1) for c in flow.calibrate(sigma))
        level = sigma.view(-1, 1, 1)
        z = k * (torch.lerp(x0_low, eps, level) @ flow.basis)
        with torch.no_grad(), self._autocast():
            v = self.base.call(self.base.transformer, z, tau.flatten(), text, self.grid)
        return flow.lift(z - tau * v.float())

    def loss(self) -> tuple[Tensor, float]:
        """The loss of this step's batch and its mean lam (0 for flow matching)."""
        x0, z0, text, sigma, eps = self._draw()
        flow = self.model.flow
        x_t = torch.lerp(x0, eps, sigma.view(-1, 1, 1))
        k, tau = flow.calibrate(sigma)
        with self._autocast():
            v = self.base.call(self.net, k.view(-1, 1, 1) * x_t, tau, text, self.grid)
        x0_hat = flow.predict_x0(v.float(), x_t, sigma)
        if self.settings.loss == "flow-matching":
            return flow_matching(x0, x0_hat, sigma, self.settings.sigma_min), 0.0
        x0_low = flow.lift(z0)
        x0_low_hat = self._reference(x0_low, eps, sigma, text)
        settings = self.settings
        result = variance_reduction(x0, x0_hat, x0_low, x0_low_hat, sigma, settings.kappa, settings.sigma_min)
        return result.loss, result.lam.mean().item()

    def advance(self) -> tuple[float, float, float]:
        """One optimizer step; returns loss, mean lam, gradient norm. Aborts on a value that is not finite."""
        progress = self.step / self.settings.steps
        factor = min(1.0, (self.step + 1) / max(1, self.settings.warmup)) * math.sqrt(1 - progress)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss, lam = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise Flux2PixelError(f"finetune: loss {loss.item()} or gradient norm {norm} at step {self.step}; stopped")
        self.optimizer.step()
        self.ema.update(self.net)
        self.step += 1
        return loss.item(), lam, norm

    def save(self, path: Path) -> None:
        """Write everything a resume needs."""
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema.state_dict()}
        state |= {"step": self.step, "recipe": dumps(self.recipe)}
        files.write(path, lambda temporary: torch.save(state, temporary))

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe; another recipe's is refused."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] != dumps(self.recipe):
            raise UsageError(
                f"{path}: is a checkpoint of another recipe; delete it to start over, or restore the recipe"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]


def finetune(recipe: Recipe, run: Path, model: Path | None = None, out: Path | None = None) -> Path:
    """Train the converted model, log to ``finetune.jsonl``, and write the averaged weights; returns the folder."""
    torch.set_num_threads(recipe.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    settings = recipe.finetune
    source = model or run / "converted"
    if recipe.base != "klein-tiny":
        raise UsageError("finetune: only the miniature's scenes can be trained on in this version; use base klein-tiny")
    pixel = load_pixel_model(source, recipe.sample)
    base = bases.open_base(recipe.base)
    say(f"finetune: model {source}, {settings.images} scenes, loss {settings.loss}")
    trainer = Trainer(recipe, pixel, base, encode_scenes(base, settings.images, FIRST_SCENE))
    checkpoint = run / "finetune.ckpt"
    if checkpoint.is_file():
        trainer.resume(checkpoint)
        say(f"finetune: goes on at step {trainer.step} from {checkpoint}")
    log = _train(trainer, run, checkpoint)
    trainer.ema.copy_to(trainer.net)
    destination = out or run / "finetuned"
    with files.new_folder(destination) as folder:
        trainer.net.save_pretrained(folder / "transformer")
        for item in sorted(source.iterdir()):
            if item.name == "transformer":
                continue
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, folder / item.name)
        record = {"from": str(source), "steps": trainer.step, "images_seen": trainer.step * settings.batch}
        files.write_json(folder / "finetune.json", record | {"recipe": as_dict(recipe), "curve": log})
    checkpoint.unlink(missing_ok=True)
    say(f"wrote {destination}")
    return destination


def _train(trainer: Trainer, run: Path, checkpoint: Path) -> list[list[float]]:
    """Run to the last step, logging and saving on the way; returns [step, mean loss, mean lam] rows."""
    settings, path = trainer.settings, run / "finetune.jsonl"
    kept = path.read_text().splitlines() if trainer.step and path.is_file() else []
    records = [r for r in map(json.loads, kept) if r["step"] <= trainer.step]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    window: list[tuple[float, float, float]] = []
    started = time.perf_counter()
    with bar("finetune", settings.steps) as progress:
        progress.advance(trainer.step)
        while trainer.step < settings.steps:
            window.append(trainer.advance())
            progress.advance(1, note=f"loss {window[-1][0]:.4f}")
            if trainer.step % settings.log_every == 0 or trainer.step == settings.steps:
                loss, lam, norm = (sum(column) / len(window) for column in zip(*window, strict=True))
                rate = len(window) * settings.batch / (time.perf_counter() - started)
                record = {"step": trainer.step, "loss": loss, "lam": lam, "grad_norm": norm, "images_per_second": rate}
                records.append(record)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                window, started = [], time.perf_counter()
            if trainer.step % settings.save_every == 0 and trainer.step < settings.steps:
                trainer.save(checkpoint)
    return [[r["step"], r["loss"], r["lam"]] for r in records]
