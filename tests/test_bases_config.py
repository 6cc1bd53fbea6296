"""Configurations as they are published or damaged: read as diffusers reads them, or refused in one line."""

import json

import diffusers
import pytest
import torch
from families import TINY, write_base

from flux2pixel.convert.plan import class_shapes
from flux2pixel.families import family_of
from flux2pixel.families.configs import init_config, read_config
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import open_base
from flux2pixel.runtime.errors import UsageError

CONVERTIBLE = [alias for alias, known in KNOWN.items() if not known.refused]


@pytest.mark.parametrize("alias", CONVERTIBLE)
def test_published_configs_are_read_as_the_stock_class_reads_them(alias):
    """SD3.5 large without dual_attention_layers, Qwen-Image with pooled_projection_dim, FLUX.1 without its axes."""
    known = KNOWN[alias]
    family = family_of(known.transformer_class)(known.configs, known.hub)
    with torch.device("meta"):
        stock = family.network_class().from_config(dict(known.transformer))
    assert class_shapes(family.network_class(), family.config) == {
        n: tuple(t.shape) for n, t in stock.state_dict().items()
    }
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in stock.config.items()}
    assert {
        key: value for key, value in config.items() if not key.startswith("_") and key in family.config
    } == family.config
    shallow = family.shallow(family.config)
    assert class_shapes(family.network_class(), shallow)
    assert class_shapes(family.network_class(), family.pixel_config(family.config))


def test_unknown_keys_are_dropped_aloud(capsys):
    known = KNOWN["qwen-image"]
    config = init_config(diffusers.QwenImageTransformer2DModel, known.transformer, "x/transformer/config.json")
    assert "pooled_projection_dim" not in config and config["zero_cond_t"] is False
    assert (
        "x/transformer/config.json: QwenImageTransformer2DModel knows no pooled_projection_dim"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_layers", 1_000_000_000, "out of bounds"),
        ("num_layers", 5000, "at most 1000 blocks"),
        ("num_layers", "five", "not of the type"),
        ("num_layers", -1, "out of bounds"),
        ("num_layers", True, "not of the type"),
        ("num_attention_heads", 0, "above 0"),
        ("eps", -1e-6, "above 0"),
        ("eps", float("nan"), "out of bounds"),
        ("axes_dims_rope", {"a": 1}, "not of the type"),
        ("axes_dims_rope", 32, "not of the type"),
        ("axes_dims_rope", [[[[[[32]]]]]], "not of the type"),
        ("guidance_embeds", "false", "not of the type"),
        ("in_channels", None, "null"),
    ],
)
def test_nonsense_in_a_config_is_refused_in_one_line(key, value, words, tmp_path):
    folder = write_base(tmp_path / "base", "flux2-klein")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError) as refusal:
        open_base(folder).config  # noqa: B018
    message = str(refusal.value)
    assert message.startswith(f"{path}: {key} = ") and words in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, ""])
def test_what_is_no_json_object_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"config\.json: (not valid JSON|holds a)"):
        read_config(path)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_tiny_base_is_read_whole(name, tmp_path):
    base = open_base(write_base(tmp_path / name, name))
    assert class_shapes(base.network_class(), base.config) == {
        key: tuple(value.shape) for key, value in base.transformer.state_dict().items()
    }


# How each family's pipeline calls its scheduler, in the pipeline's own module: see the stock `__call__`.
def stock_levels(alias, steps, tokens):
    """The noise levels that the stock pipeline's own code sets, from the published scheduler configuration."""
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(KNOWN[alias].configs["scheduler"]))
    config, given = scheduler.config, {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    by_size = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    if alias.startswith("flux2"):
        given["mu"] = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    elif alias.startswith(("flux1", "qwen")):
        given["mu"] = calculate_shift(tokens, *by_size)
    elif alias.startswith("z-image"):
        given = {"sigmas": get_default_z_image_sigmas(steps), "mu": calculate_shift(tokens, *by_size)}
    elif alias.startswith("sd3"):
        given = {"num_inference_steps": steps}
    retrieve_timesteps(scheduler, device="cpu", **given)
    return scheduler.sigmas


@pytest.mark.parametrize("alias", CONVERTIBLE)
def test_the_time_grid_is_the_stock_pipelines(alias):
    known = KNOWN[alias]
    family = family_of(known.transformer_class)(known.configs, known.hub)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(known.configs["scheduler"]))
    for steps, tokens in ((known.defaults.steps, 4096), (4, 1024), (28, 6144)):
        levels = family.time_grid(scheduler, steps, tokens)
        assert torch.equal(levels, stock_levels(alias, steps, tokens))
        assert len(levels) == steps + 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    untouched = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(known.configs["scheduler"]))
    assert torch.equal(scheduler.sigmas, untouched.sigmas)
    if alias == "qwen-image":
        assert abs(float(levels[-2]) - 0.02) < 1e-6, "stretched to the published terminal level"
    if alias == "flux2-klein-4b":
        assert abs(family.mu(scheduler, 50, 4096) - 2.023) < 1e-3


def test_a_base_on_disk_draws_on_its_own_schedule(tmp_path):
    base = open_base(write_base(tmp_path / "base", "z-image"))
    levels = base.time_grid(4, 8 * base.patch_size, 8 * base.patch_size)
    start = torch.linspace(1, 0.25, 4)
    torch.testing.assert_close(levels[:-1], 6 * start / (1 + 5 * start))
