"""Each family's text path on tiny encoders: prompts become the stock pipeline's conditioning, whatever the batch."""

import diffusers
import pytest
import torch
from families import write_base
from text_encoders import write_text

from flux2pixel.families import open_base
from flux2pixel.families.base import stack, take

FAMILIES = ["flux1-dev", "flux1-schnell", "flux2-dev", "flux3", "qwen-image", "sd3.5-large", "z-image"]
PROMPTS = ["a photo of two red circle on white", "blue square", "a photo of two red circle on white", ""]
MASKED = {"flux3", "qwen-image", "z-image"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    opened = {}
    for name in FAMILIES:
        write_base(root / name, name, **({"joint_attention_dim": 128} if name == "flux3" else {}))
        write_text(root / name, name)
        opened[name] = open_base(root / name)
    return opened


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_follow_the_prompts_and_do_not_depend_on_the_batch(bases, name):
    base = bases[name]
    cond = base.text(PROMPTS)
    assert all(len(value) == 4 for value in cond.values())
    assert ("mask" in cond) == (name in MASKED)
    assert torch.equal(cond["text"][0], cond["text"][2])
    assert not torch.allclose(cond["text"][0], cond["text"][1])
    alone = base.text(PROMPTS[1:2])
    real = slice(None, int(alone["mask"].sum()) if name in MASKED else None)
    torch.testing.assert_close(alone["text"][0, real], cond["text"][1, real], atol=1e-4, rtol=1e-4)
    tokens, time = torch.randn(4, 6, base.latent_width), torch.full((4,), 0.6)
    with torch.no_grad():
        together = base.call(base.transformer, tokens, time, cond, (2, 3))
        single = base.call(base.transformer, tokens[1:2], time[1:2], alone, (2, 3))
    torch.testing.assert_close(together[1:2], single, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_branches_of_guidance_in_one_forward(bases, name):
    base = bases[name]
    text, empty = base.text(PROMPTS[:2]), take(base.text([""]), torch.zeros(2, dtype=torch.long))
    tokens, time = torch.randn(2, 6, base.latent_width), torch.full((2,), 0.6)
    with torch.no_grad():
        v, away = base.branches(base.transformer, tokens, time, text, empty, 3.0, (2, 3))
        assert (away is not None) == (base.guidance == "cfg")
        if away is not None:
            torch.testing.assert_close(
                away, base.call(base.transformer, tokens, time, empty, (2, 3)), atol=1e-3, rtol=1e-3
            )
            assert base.branches(base.transformer, tokens, time, text, empty, 1.0, (2, 3))[1] is None
        if base.guidance == "embedded":
            other, _ = base.branches(base.transformer, tokens, time, text, empty, 6.0, (2, 3))
            assert not torch.allclose(v, other)


@pytest.mark.parametrize("name", ["flux1-dev", "sd3.5-large", "qwen-image", "z-image", "flux2-dev"])
def test_a_prompt_draws_what_the_stock_pipeline_draws(bases, name):
    """From the words on: the stock pipeline opens the same folder, tokenizers, encoders, scheduler and all."""
    base = bases[name]
    kind = {
        "flux1-dev": diffusers.FluxPipeline,
        "sd3.5-large": diffusers.StableDiffusion3Pipeline,
        "qwen-image": diffusers.QwenImagePipeline,
        "z-image": diffusers.ZImagePipeline,
        "flux2-dev": diffusers.Flux2Pipeline,
    }[name]
    parts = {
        part.name: getattr(base, part.name, None) or getattr(getattr(base, "_prompts", None), part.name, None)
        for part in base.folder.iterdir()
        if part.name.startswith(("text_encoder", "tokenizer"))
    }
    base.text([""])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = kind(scheduler=scheduler, vae=base.vae, transformer=base.transformer, **parts)
    pipeline.set_progress_bar_config(disable=True)
    given = {
        "flux1-dev": {"guidance_scale": 3.0},
        "sd3.5-large": {"guidance_scale": 3.0},
        "qwen-image": {"true_cfg_scale": 3.0, "negative_prompt": ""},
        "z-image": {"guidance_scale": 2.0, "sigmas": [1.0, 0.5]},
        "flux2-dev": {"guidance_scale": 3.0},
    }[name]
    size = (2 * base.patch_size, 3 * base.patch_size)
    noise = torch.randn(1, 6, base.latent_width, generator=torch.Generator().manual_seed(3))
    image = noise.mT.unflatten(2, (2, 3))
    latents = {"flux2-dev": image, "flux1-dev": noise, "qwen-image": noise}.get(
        name, torch.nn.functional.pixel_shuffle(image, 2)
    )
    theirs = pipeline(
        prompt=PROMPTS[0],
        latents=latents,
        height=size[0],
        width=size[1],
        num_inference_steps=2,
        output_type="pt",
        **given,
    ).images
    z, text, empty = noise, base.text(PROMPTS[:1]), base.text([""])
    with torch.no_grad():
        for sigma, following in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False):
            v, away = base.branches(base.transformer, z, sigma.expand(1), text, empty, 3.0, (2, 3))
            z = z + (following - sigma) * (v if away is None else base.guide(v, away, 3.0))
        mine = base.decode(z, *size).clamp(0, 1)
    assert mine.std() > 0.05
    assert (mine - theirs).abs().max() < 2e-3


def test_joining_texts_of_unequal_length_needs_a_mask():
    short, long = ({"text": torch.ones(1, n, 3), "mask": torch.ones(1, n, dtype=torch.bool)} for n in (2, 5))
    joined = stack(short, long)
    assert joined["text"].shape == (2, 5, 3) and joined["mask"].sum(1).tolist() == [2, 5]
    with pytest.raises(ValueError, match="without a mask"):
        stack({"text": short["text"]}, {"text": long["text"]})
    with pytest.raises(ValueError, match="different keys"):
        stack(short, {"text": long["text"]})
