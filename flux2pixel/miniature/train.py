"""Train ``klein-tiny`` from scratch: ``python -m flux2pixel.miniature.train --work DIR``.

Stages: scenes, VAE, text encoder, transformer, assembly. Seeded; each stage leaves its result under ``--work`` and is
skipped when that is there; the transformer also checkpoints on the way and goes on from where it was stopped.

Two design choices make so small a base behave like a large one. The VAE has an auxiliary loss that decodes its
normalised latent tokens to Oklab patches by a *scaled orthonormal* map (FLUX latents are nearly that; a small VAE's
are not unless asked, and conversion is only as good as that map). The text encoder
is a frozen random Qwen3, wide in its embeddings: with 29 words, telling them apart is all that is asked of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2pixel.asymflow import color
from flux2pixel.miniature import world

TEXT_TOKENS = 12
SCENES = 40_000
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_atomically(path: Path, save) -> None:
    """Call ``save(temporary)`` and rename the result to ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


def make_scenes(work: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """Render the training set once; returns images (count, 32, 32, 3) uint8 and captions."""
    path = work / "scenes.npz"
    if not path.exists():
        scenes = [world.sample(seed) for seed in range(count)]
        images, captions = np.stack([s.image for s in scenes]), np.array([s.caption for s in scenes])
        write_atomically(path, lambda p: np.savez(p.open("wb"), images=images, captions=captions))
    stored = np.load(path)
    return stored["images"], stored["captions"].tolist()


def to_unit(images: np.ndarray | Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255


def new_vae():
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def encode_latents(vae, images: np.ndarray, batch: int = 250) -> Tensor:
    """Encode to normalised, packed latent tokens (count, N, 16), as the klein pipeline does."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    packed = []
    for start in range(0, len(images), batch):
        x = to_unit(images[start : start + batch]) * 2 - 1
        z = F.pixel_unshuffle(vae.encode(x).latent_dist.mode(), 2)
        packed.append(((z - mean) / deviation).flatten(2).mT.contiguous())
    return torch.cat(packed)


class Alignment(nn.Module):
    """The auxiliary loss: mean ||x - s A z||^2 over patch tokens, A orthonormal and s free, both learned."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.utils.parametrizations.orthogonal(nn.Linear(16, 192, bias=False))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, latent: Tensor, oklab: Tensor) -> Tensor:
        """``latent`` (B, 4, H/4, W/4) and ``oklab`` (B, 3, H, W) -> ()."""
        packed = F.batch_norm(F.pixel_unshuffle(latent, 2), None, None, training=True)
        lifted = self.log_scale.exp() * self.basis(packed.flatten(2).mT)
        return (F.pixel_unshuffle(oklab, 8).flatten(2).mT - lifted).square().mean()


def train_vae(work: Path, images: np.ndarray, steps: int, log) -> None:
    """Reconstruction + KL + linear decodability of the latents; then fit the batch-norm statistics."""
    torch.manual_seed(0)
    vae, linear = new_vae(), Alignment()
    optimizer = torch.optim.AdamW([*vae.parameters(), *linear.parameters()], 2e-3, betas=(0.9, 0.99), weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        unit = to_unit(images[torch.randint(len(images), (64,), generator=generator).numpy()])
        x = unit * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            y = vae.decode(z).sample.float()
        error = y - x
        reconstruction = error.abs().mean() + error.square().mean()
        kl = posterior.kl().mean() / x[0].numel()
        straight = linear(posterior.mean.float(), color.encode(unit))
        loss = reconstruction + 3e-3 * kl + 0.3 * straight
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            log(stage="vae", step=step, psnr=psnr, kl=kl.item(), linear=straight.item(), seconds=time.time() - started)
    vae.eval()
    with torch.no_grad():
        z = torch.cat(
            [
                F.pixel_unshuffle(vae.encode(to_unit(images[i : i + 250]) * 2 - 1).latent_dist.mode(), 2)
                for i in range(0, 20_000, 250)
            ]
        )
        vae.bn.running_mean.copy_(z.mean((0, 2, 3)))
        vae.bn.running_var.copy_(z.var((0, 2, 3)))
    write_atomically(work / "vae", vae.save_pretrained)


def make_text_encoder(work: Path) -> None:
    """A byte-level BPE over the world's captions and a frozen random Qwen3 with wide embeddings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    captions = [m["prompt"] for group in world.all_metadata().values() for m in group]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(captions, trainer)
    folder = work / "bpe"
    folder.mkdir(exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = Qwen2TokenizerFast(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = TEXT_TOKENS
    tokenizer.save_pretrained(work / "tokenizer")
    torch.manual_seed(2)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=max(640, len(tokenizer)),
            hidden_size=48,
            intermediate_size=48,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=24,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    nn.init.normal_(encoder.model.embed_tokens.weight, std=1.0)
    encoder.half().save_pretrained(work / "text_encoder")


@torch.no_grad()
def encode_captions(work: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Embed each distinct caption with the klein pipeline's own code.

    Returns embeddings (distinct + 1, 12, 144), the empty prompt first, and the row of each caption.
    """
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    tokenizer = Qwen2TokenizerFast.from_pretrained(work / "tokenizer")
    encoder = Qwen3ForCausalLM.from_pretrained(work / "text_encoder", dtype=torch.float32).eval()
    distinct = ["", *sorted(set(captions))]
    row = {caption: index for index, caption in enumerate(distinct)}
    embeddings = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        text_encoder=encoder, tokenizer=tokenizer, prompt=distinct, max_sequence_length=TEXT_TOKENS
    )
    return embeddings.float(), torch.tensor([row[c] for c in captions])


def new_transformer():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=144,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 16, 16, 8),
        rope_theta=2000,
        guidance_embeds=False,
    )


def position_ids(side: int, text: int) -> tuple[Tensor, Tensor]:
    """The klein pipeline's (t, h, w, l) ids of a square grid of image tokens and of the text tokens."""
    one, grid = torch.arange(1), torch.arange(side)
    image = torch.cartesian_prod(one, grid, grid, one)
    return image.float(), torch.cartesian_prod(one, one, one, torch.arange(text)).float()


class Trainer:
    """Flow matching on cached latents with Muon for the matrices inside the blocks and AdamW for the rest."""

    def __init__(self, work: Path, latents: Tensor, text: Tensor, rows: Tensor, steps: int, batch: int, log):
        torch.manual_seed(3)
        self.work, self.latents, self.text, self.rows, self.log = work, latents, text, rows, log
        self.steps, self.batch, self.step = steps, batch, 0
        self.model = new_transformer()
        self.ema = {k: v.clone() for k, v in self.model.state_dict().items()}
        inner = [p for n, p in self.model.named_parameters() if "transformer_blocks" in n and p.ndim == 2]
        inner_ids = {id(p) for p in inner}
        outer = [p for p in self.model.parameters() if id(p) not in inner_ids]
        self.muon = torch.optim.Muon(inner, lr=3e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(outer, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
        self.peaks = [(self.muon, 3e-3), (self.adam, 2e-3)]
        self.ids = position_ids(math.isqrt(latents.shape[1]), text.shape[1])
        self.checkpoint = work / "transformer.ckpt"
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.ema, self.step = state["ema"], state["step"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "ema": self.ema, "step": self.step}
        state |= {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def loss(self) -> Tensor:
        # One generator per step, so that a resumed run draws what the uninterrupted one would have.
        g = torch.Generator().manual_seed(1000 + self.step)
        index = torch.randint(len(self.latents), (self.batch,), generator=g)
        z, row = self.latents[index], self.rows[index].clone()
        row[torch.rand(self.batch, generator=g) < 0.1] = 0
        sigma = torch.sigmoid(torch.randn(self.batch, generator=g) + 0.3)
        noise = torch.randn(z.shape, generator=g)
        z_t = torch.lerp(z, noise, sigma.view(-1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            v = self.model(
                hidden_states=z_t,
                encoder_hidden_states=self.text[row],
                timestep=sigma,
                img_ids=self.ids[0],
                txt_ids=self.ids[1],
                return_dict=False,
            )[0]
        return (v.float() - (noise - z)).square().mean()

    def run(self, save_seconds: float) -> None:
        average, started, saved, first = None, time.time(), time.time(), self.step
        while self.step < self.steps:
            done = self.step / self.steps
            for optimizer, peak in self.peaks:
                optimizer.param_groups[0]["lr"] = peak * min(1, (self.step + 1) / 200, (1 - done) / 0.5 + 0.01)
            loss = self.loss()
            self.muon.zero_grad()
            self.adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.muon.step()
            self.adam.step()
            self.step += 1
            decay = min(0.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, value in self.model.state_dict().items():
                    self.ema[key].lerp_(value, 1 - decay)
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if self.step % 100 == 0:
                seconds = time.time() - started
                rate = (self.step - first) * self.batch / seconds
                self.log(stage="transformer", step=self.step, loss=average, samples_per_second=rate, seconds=seconds)
            if time.time() - saved > save_seconds or self.step == self.steps:
                self.save()
                saved = time.time()


def assemble(work: Path, out: Path) -> None:
    """Write the diffusers directory from the stages' results (EMA weights of the transformer, float16)."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

    transformer = new_transformer()
    transformer.load_state_dict(torch.load(work / "transformer.ckpt", weights_only=True)["ema"])
    tokenizer = Qwen2TokenizerFast.from_pretrained(work / "tokenizer")
    tokenizer.model_max_length = TEXT_TOKENS
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKLFlux2.from_pretrained(work / "vae").half(),
        text_encoder=Qwen3ForCausalLM.from_pretrained(work / "text_encoder", dtype=torch.float16),
        tokenizer=tokenizer,
        transformer=transformer.half(),
        is_distilled=False,
    )
    pipeline.save_pretrained(out)
    config = out / "vae" / "config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}  # a local path
    config.write_text(json.dumps(kept, indent=2) + "\n")


def publish_log(work: Path, folder: Path) -> None:
    """Copy the log and draw the transformer's training curve (needs the ``train`` extra, matplotlib)."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    text = (work / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text)
    records = [r for r in map(json.loads, text.splitlines()) if r["stage"] == "transformer"]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records])
    axes.set(xlabel="step", ylabel="flow-matching loss (running mean)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "curve.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="assemble the diffusers directory here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)

    def log(**record) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        print(line, flush=True)
        with (args.work / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    images, captions = make_scenes(args.work, args.scenes)
    if not (args.work / "vae").exists():
        train_vae(args.work, images, args.vae_steps, log)
    if not (args.work / "text_encoder").exists():
        make_text_encoder(args.work)
    from diffusers import AutoencoderKLFlux2

    if not (args.work / "latents.pt").exists():
        latents = encode_latents(AutoencoderKLFlux2.from_pretrained(args.work / "vae").eval(), images)
        write_atomically(args.work / "latents.pt", lambda path: torch.save(latents, path))
    latents = torch.load(args.work / "latents.pt", weights_only=True)
    text, rows = encode_captions(args.work, captions)
    Trainer(args.work, latents, text, rows, args.steps, args.batch, log).run(save_seconds=180)
    if args.out:
        assemble(args.work, args.out)
        publish_log(args.work, args.out.parent / "training")


if __name__ == "__main__":
    main()
