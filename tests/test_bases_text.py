"""Each family's text path on tiny encoders: prompts become the stock pipeline's conditioning, whatever the batch."""

import diffusers
import pytest
import torch
from families import write_base
from safetensors.torch import load_file, save_file
from text_encoders import STOCK, stock_text, write_text

from flux2pixel.families.base import stack, take
from flux2pixel.models.base import open_base
from flux2pixel.runtime.errors import UsageError

FAMILIES = ["flux1-dev", "flux1-schnell", "flux2-dev", "flux2-klein", "flux3", "qwen-image", "sd3.5-large", "z-image"]
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


@torch.no_grad()
def stock_conditioning(base, name):
    """What the stock pipeline's own encode_prompt makes of PROMPTS, with its own whole encoders; one list a key."""
    parts = stock_text(base.folder, name)
    if name == "flux3":
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        embed = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
        return {"text": [embed(parts["text_encoder"], parts["tokenizer"], prompt)[0] for prompt in PROMPTS]}
    pipeline = getattr(diffusers, STOCK[name][0])(scheduler=None, vae=None, transformer=None, **parts)
    match name:
        case "flux1-dev" | "flux1-schnell":
            length = 256 if name == "flux1-schnell" else 512
            text, pooled, _ = pipeline.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=length)
            return {"text": list(text), "pooled": list(pooled)}
        case "sd3.5-large":
            text, _, pooled, _ = pipeline.encode_prompt(
                PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False
            )
            return {"text": list(text), "pooled": list(pooled)}
        case "z-image":
            text, _ = pipeline.encode_prompt(list(PROMPTS), device="cpu", do_classifier_free_guidance=False)
            return {"text": text}
        case "qwen-image":
            text, mask = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=512)
            return {"text": [row[real.bool()] for row, real in zip(text, mask, strict=True)]}
    text, _ = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=512)
    return {"text": list(text)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_conditioning_is_the_stock_pipelines_to_the_bit(bases, name):
    """With no vocabulary head and no layer behind the last one read; PROMPTS encoded as one batch by both."""
    base = bases[name]
    mine = base.facts.embed(base.text_parts, list(PROMPTS))
    theirs = stock_conditioning(base, name)
    for key, rows in theirs.items():
        for row, (expected, found) in enumerate(zip(rows, mine[key], strict=True)):
            if key == "text" and "mask" in mine:
                found = found[mine["mask"][row]]
            assert torch.equal(found, expected), (key, row)


@pytest.mark.parametrize(("name", "layers"), [("flux2-klein", 27), ("flux2-dev", 30), ("flux3", 32), ("z-image", 1)])
def test_layers_that_nothing_reads_and_heads_are_not_loaded(bases, name, layers):
    encoder = bases[name].text_parts["text_encoder"]
    names = [name for name, _ in encoder.named_parameters()]
    numbers = {int(part.split(".")[0]) for name in names for part in name.split("layers.")[1:]}
    assert numbers == set(range(layers))
    assert not [name for name in names if "lm_head" in name or "vision" in name or "visual" in name]


def test_prompts_are_encoded_by_a_budget_of_tokens(bases, monkeypatch):
    """16 prompts of 512 tokens at a time, 64 where a prompt is short."""
    base, seen = bases["z-image"], []
    embed = type(base.facts).embed
    monkeypatch.setattr(type(base.facts), "embed", lambda s, p, some: (seen.append(len(some)), embed(s, p, some))[1])
    base.text([f"a {'red ' * i}circle" for i in range(20)])
    assert seen == [16, 4]
    monkeypatch.setattr(type(base.facts), "text_length", lambda self, parts: 12)
    seen.clear()
    base.text([f"a {'red ' * i}circle" for i in range(70)])
    assert seen == [64, 6]


@pytest.mark.parametrize(("part", "lost"), [("text_encoder", "layers.0.mlp.up_proj.weight"), ("transformer", "x_pad")])
def test_weights_that_lack_a_tensor_are_refused_not_made_up(tmp_path, part, lost):
    folder = write_base(tmp_path / "base", "z-image")
    write_text(folder, "z-image")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    gone = [name for name in tensors if lost in name]
    save_file({name: value for name, value in tensors.items() if name not in gone}, path, {"format": "pt"})
    base = open_base(folder)
    with pytest.raises(UsageError, match=rf"{part}: its weights lack .*{lost}"):
        base.text(["a"]) if part == "text_encoder" else base.transformer


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    folder = write_base(tmp_path / "base", "z-image")
    write_text(folder, "z-image")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="tokenizer: holds no vocabulary"):
        open_base(folder).text(["a"])


def test_what_is_freed_is_loaded_again(bases):
    base = bases["z-image"]
    before = base.text(["a"])["text"]
    base.free("text")
    assert "text_parts" not in base.__dict__
    assert torch.equal(base.text(["a"])["text"], before)


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein", "z-image"])
def test_offloaded_models_compute_the_same(bases, name, offload):
    """The CPU plays the accelerator: what is tested is that hooks and stock pipelines go together."""
    whole, waiting = bases[name], open_base(bases[name].folder, offload=offload)
    text, expected = waiting.text(PROMPTS[:2]), whole.text(PROMPTS[:2])
    assert torch.equal(text["text"], expected["text"])
    tokens, time = torch.randn(2, 6, whole.latent_width), torch.full((2,), 0.6)
    with torch.no_grad():
        found = waiting.call(waiting.transformer, tokens, time, text, (2, 3))
        assert torch.equal(found, whole.call(whole.transformer, tokens, time, expected, (2, 3)))


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
    kind = getattr(diffusers, STOCK[name][0])
    parts = stock_text(base.folder, name)
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
