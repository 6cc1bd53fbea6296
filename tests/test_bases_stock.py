"""Each family against its own stock pipeline: the same images, so time, sign, packing, norms and guidance are right."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from families import TINY, write_base
from PIL import Image

from flux2pixel.families.base import take
from flux2pixel.models.base import open_base

STEPS, GRID = 3, (2, 3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: open_base(write_base(folder / name, name)) for name in TINY}


def scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)


def inputs(base):
    """Noise of one image, and conditionings of a prompt and of an empty one."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, GRID[0] * GRID[1], base.latent_width, generator=generator)
    cond = {k: v if v.dtype == torch.bool else v.float() for k, v in _full(base, generator).items()}
    return noise, take(cond, slice(0, 1)), take(cond, slice(1, 2))


def _full(base, generator):
    cond = base.random_conditioning(base.config, 2, generator)
    if "mask" in cond:
        cond["mask"] = torch.ones_like(cond["mask"])
    return cond


@torch.no_grad()
def ours(base, sigmas, guidance, references=()):
    """Euler in latents by ``base.call`` and ``base.guide``, decoded by ``base.decode``."""
    z, text, empty = inputs(base)
    for sigma, following in pairwise(sigmas):
        time = sigma.expand(1)
        v = base.call(base.transformer, z, time, text, GRID, references)
        if guidance > 1:
            v = base.guide(v, base.call(base.transformer, z, time, empty, GRID, references), guidance)
        z = z + (following - sigma) * v
    return base.decode(z, *size(base)).clamp(0, 1)


def size(base):
    return GRID[0] * base.patch_size, GRID[1] * base.patch_size


def unpacked(z, patch=None):
    image = z.mT.unflatten(2, GRID)
    return torch.nn.functional.pixel_shuffle(image, patch) if patch else image


def same(base, pipeline, guidance, references=(), **given):
    """Run the pipeline and compare; returns the largest difference of any pixel."""
    pipeline.set_progress_bar_config(disable=True)
    height, width = size(base)
    given |= {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "pt"}
    theirs = pipeline(**given).images
    mine = ours(base, pipeline.scheduler.sigmas, guidance, references)
    assert mine.std() > 0.05 and ((mine > 0) & (mine < 1)).float().mean() > 0.2, "an image worth comparing"
    return (theirs - mine).abs().max().item()


def empty_parts(*names):
    return dict.fromkeys(names)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flux2_klein(bases, guidance):
    base = bases["flux2-klein"]
    parts = empty_parts("text_encoder", "tokenizer")
    pipeline = diffusers.Flux2KleinPipeline(scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts)
    noise, text, empty = inputs(base)
    given = {"prompt_embeds": text["text"], "negative_prompt_embeds": empty["text"], "latents": unpacked(noise)}
    assert same(base, pipeline, guidance, guidance_scale=guidance, **given) < 1e-4
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (64, side, 3), np.uint8)) for side in (72, 64)]
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 for picture in pictures]
    references = [(base.encode(t), (t.shape[2] // 4, t.shape[3] // 4)) for t in tensors]
    assert same(base, pipeline, guidance, references, guidance_scale=guidance, image=pictures, **given) < 1e-4


def test_flux2_dev(bases):
    base = bases["flux2-dev"]
    parts = empty_parts("text_encoder", "tokenizer")
    pipeline = diffusers.Flux2Pipeline(scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts)
    noise, text, _ = inputs(base)
    assert same(base, pipeline, 1, prompt_embeds=text["text"], latents=unpacked(noise)) < 1e-4


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_flux1(bases, name):
    base = bases[name]
    parts = empty_parts("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxPipeline(scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts)
    noise, text, _ = inputs(base)
    given = {"prompt_embeds": text["text"], "pooled_prompt_embeds": text["pooled"], "latents": noise}
    assert same(base, pipeline, 1, **given) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_sd3(bases, name, guidance):
    base = bases[name]
    parts = empty_parts(*(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")))
    pipeline = diffusers.StableDiffusion3Pipeline(
        scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts
    )
    noise, text, empty = inputs(base)
    given = {"prompt_embeds": text["text"], "pooled_prompt_embeds": text["pooled"]}
    given |= {"negative_prompt_embeds": empty["text"], "negative_pooled_prompt_embeds": empty["pooled"]}
    assert same(base, pipeline, guidance, latents=unpacked(noise, 2), guidance_scale=guidance, **given) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_qwen_image(bases, guidance):
    base = bases["qwen-image"]
    parts = empty_parts("text_encoder", "tokenizer")
    pipeline = diffusers.QwenImagePipeline(scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts)
    noise, text, empty = inputs(base)
    given = {"prompt_embeds": text["text"], "prompt_embeds_mask": text["mask"], "latents": noise}
    given |= {"negative_prompt_embeds": empty["text"], "negative_prompt_embeds_mask": empty["mask"]}
    assert same(base, pipeline, guidance, true_cfg_scale=guidance, **given) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_z_image(bases, guidance):
    base = bases["z-image"]
    parts = empty_parts("text_encoder", "tokenizer")
    pipeline = diffusers.ZImagePipeline(scheduler=scheduler(), vae=base.vae, transformer=base.transformer, **parts)
    noise, text, empty = inputs(base)
    given = {"prompt_embeds": [text["text"][0]], "negative_prompt_embeds": [empty["text"][0]]}
    sigmas = [1.0, 0.6, 0.3]  # the pipeline's own grid depends on the diffusers version
    given |= {"latents": unpacked(noise, 2), "guidance_scale": guidance - 1, "sigmas": sigmas}
    assert same(base, pipeline, guidance, **given) < 1e-4


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_flux3(bases, guidance, edited):
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoCoreDenoiseStep

    base = bases["flux3"]
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {"denoise": Flux3AutoCoreDenoiseStep(), "decode": Flux3DecodeStep()}
    )
    pipeline = blocks.init_pipeline()
    pipeline.update_components(transformer=base.transformer, vae=base.vae, scheduler=scheduler())
    pipeline.guider.guidance_scale = guidance
    noise, text, empty = inputs(base)
    given = {"prompt_embeds": text["text"], "negative_prompt_embeds": empty["text"], "latents": unpacked(noise)}
    references = []
    if edited:
        rgb = torch.rand(1, 3, 8, 4, generator=torch.Generator().manual_seed(1))
        references = [(base.encode(rgb), (2, 1)), (base.encode(rgb.mT), (1, 2))]
        given["image_cond_latents"] = [z.mT.unflatten(2, shape) for z, shape in references]
    height, width = size(base)
    theirs = pipeline(**given, height=height, width=width, num_inference_steps=STEPS, output_type="pt", output="images")
    mine = ours(base, pipeline.scheduler.sigmas, guidance, references)
    assert (theirs - mine).abs().max() < 1e-4 and mine.std() > 0.05


@pytest.mark.parametrize("name", sorted(TINY))
def test_decode_undoes_the_packing_and_the_norm_of_encode(bases, name, monkeypatch):
    base = bases[name]
    rgb = torch.rand(2, 3, *size(base), generator=torch.Generator().manual_seed(2))
    image = rgb.unsqueeze(2) if name == "qwen-image" else rgb
    mode = base.vae.encode(image * 2 - 1).latent_dist.mode()
    seen = []
    decode = type(base.vae).decode
    monkeypatch.setattr(type(base.vae), "decode", lambda self, z: (seen.append(z), decode(self, z))[1])
    z = base.encode(rgb)
    assert z.shape == (2, 6, base.latent_width)
    assert base.decode(z, *size(base)).shape == rgb.shape
    torch.testing.assert_close(seen[0], mode)
