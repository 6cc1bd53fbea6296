"""The procedural world, its detector, and the bundled base."""

import numpy as np
import pytest
import torch

from flux2pixel.evaluate.geneval import judge
from flux2pixel.miniature import detector, world
from flux2pixel.models import base as bases

FOLDER = bases.resolve("klein-tiny")


def test_scenes_are_a_function_of_the_seed():
    first, again, other = world.sample(5), world.sample(5), world.sample(6)
    assert np.array_equal(first.image, again.image) and first.metadata == again.metadata
    assert not np.array_equal(first.image, other.image)


def test_training_captions_never_contain_a_withheld_prompt():
    assert len(world.EVAL_METADATA) == 120
    assert {m["tag"] for m in world.EVAL_METADATA} == set(world.TAGS)
    assert len(world.HELD_OUT & {m["prompt"] for m in world.EVAL_METADATA}) == len(world.HELD_OUT) == 63
    assert not world.HELD_OUT & {world.sample(seed).caption for seed in range(1500)}


@pytest.mark.parametrize("metadata", world.EVAL_METADATA[::7], ids=lambda m: m["prompt"])
def test_a_scene_shows_its_caption_and_the_detector_sees_it(metadata):
    scene = world.sample(11, metadata=metadata, held_out=frozenset())
    wanted = sum(group["count"] for group in metadata["include"])
    assert len(scene.objects) == wanted
    found = detector.detect(scene.image)
    assert judge(metadata, found, lambda _, box: detector.classify_color(scene.image, box)).correct


def test_the_detector_is_right_on_true_renders_and_not_on_noise_or_other_captions():
    rng = np.random.default_rng(0)
    right = wrong = 0
    for seed in range(200):
        scene, other = world.sample(50_000 + seed), world.sample(60_000 + seed)
        found = detector.detect(scene.image)

        def color(_, box, image=scene.image):
            return detector.classify_color(image, box)

        right += judge(scene.metadata, found, color).correct
        wrong += judge(other.metadata, found, color).correct and other.caption != scene.caption
    assert right >= 0.97 * 200
    assert wrong <= 0.35 * 200  # "a photo of a circle" is true of many scenes
    noise = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert not judge(world.EVAL_METADATA[-1], detector.detect(noise), lambda *_: "red").correct
    flat = np.full((32, 32, 3), 110, np.uint8)
    assert detector.detect(flat) == {}


def test_the_bundled_base_is_small_and_of_the_stock_classes():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 16e6
    assert not list(FOLDER.rglob("*.bin"))
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(FOLDER)
    classes = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert classes.pop("tokenizer") in ("Qwen2TokenizerFast", "Qwen2Tokenizer")
    assert (
        classes
        == {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "vae": "AutoencoderKLFlux2",
            "text_encoder": "Qwen3ForCausalLM",
            "transformer": "Flux2Transformer2DModel",
        }
        | {"is_distilled": "bool"}
        or "is_distilled" not in classes
    )
    pipe = pipe.to(torch.float32)
    image = pipe(
        prompt="a photo of a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=12,
    ).images[0]
    assert image.size == (32, 32)


def test_the_vae_reconstructs_what_its_latents_carry():
    base = bases.open_base(FOLDER)
    rgb = torch.from_numpy(np.stack([world.sample(70_000 + i).image for i in range(16)])).permute(0, 3, 1, 2) / 255
    z = base.encode(rgb)
    assert z.shape == (16, 16, base.latent_width) and base.patch_size == 8
    assert abs(float(z.std()) - 1) < 0.1
    psnr = -10 * (base.decode(z, 32, 32) - rgb).square().mean().log10()
    # The grain alone, which the latents cannot hold, caps the ratio near 28.5 dB.
    assert psnr > 26
