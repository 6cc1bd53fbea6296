"""The published configurations on the meta device: what folding touches is there, and every count is the table's."""

import re

import diffusers
import pytest
import torch

from flux2pixel.convert.fold import folded_names
from flux2pixel.families import family_of
from flux2pixel.families.configs import init_config
from flux2pixel.families.known import KNOWN

KEYS = {
    "flux2-klein-4b": 169,
    "flux2-klein-9b": 233,
    "flux2-dev": 331,
    "flux1-dev": 1160,
    "flux1-schnell": 1156,
    "sd3.5-medium": 909,
    "sd3.5-large": 1227,
    "qwen-image": 1933,
    "z-image": 521,
    "flux3-klein": 357,
    "flux3-klein-distilled": 359,
}
DIM = {"flux2-klein-9b": 4096, "flux2-dev": 6144, "sd3.5-medium": 1536, "sd3.5-large": 2432, "z-image": 3840}
BIASED = ("flux1", "sd3", "qwen", "z-image")


def config_of(alias):
    """Constructor arguments, from what was published; of the flow map too, which no family is made of."""
    known = KNOWN[alias]
    return init_config(getattr(diffusers, known.transformer_class), known.transformer, alias)


def meta(class_name, config):
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config)


@pytest.mark.parametrize("alias", sorted(KEYS))
def test_published_configurations_have_the_tensors_that_folding_expects(alias):
    known = KNOWN[alias]
    latent = meta(known.transformer_class, config_of(alias))
    assert sum(p.numel() for p in latent.parameters()) == known.parameters
    state = latent.state_dict()
    assert len(state) == KEYS[alias]
    dim, r = DIM.get(alias, 3072), known.rank
    projections = family_of(known.transformer_class).projections
    for name in projections.inputs:
        weight = state[f"{name}.weight"]
        assert weight.shape == ((dim, 16, 2, 2) if alias.startswith("sd3") else (dim, r))
        assert (f"{name}.bias" in state) == alias.startswith(BIASED)
    assert state[f"{projections.output}.weight"].shape == (r, dim)
    assert (f"{projections.output}.bias" in state) == alias.startswith(BIASED)
    width = (dim, 256) if alias == "z-image" else (2 * dim, dim)
    assert state[f"{projections.modulation}.weight"].shape == width


@pytest.mark.parametrize("alias", sorted(set(KEYS) - {"flux3-klein-distilled"}))
def test_the_pixel_model_differs_in_its_projections_alone(alias):
    known = KNOWN[alias]
    base = family_of(known.transformer_class)(known.configs)
    latent = meta(known.transformer_class, config_of(alias)).state_dict()
    pixel = meta(known.transformer_class, base.pixel_config(base.config)).state_dict()
    assert {base.pixel_name(name) for name in latent} == set(pixel)
    folded = folded_names(base.projections)
    changed = {name for name in latent if latent[name].shape != pixel[base.pixel_name(name)].shape}
    assert changed == folded & set(latent)
    for name in base.projections.inputs:
        assert pixel[base.pixel_name(f"{name}.weight")][0].numel() == 768
    assert len(pixel[base.pixel_name(f"{base.projections.output}.weight")]) == 768


@pytest.mark.parametrize("alias", sorted(set(KNOWN) - {"flux3-klein-distilled"}))
def test_published_vaes_give_the_patch_and_rank_of_the_table(alias):
    known = KNOWN[alias]
    family = family_of(known.transformer_class)(known.configs, known.hub)
    assert (family.patch_size, family.latent_width, family.token_width) == (known.patch, known.rank, 768)
    with torch.device("meta"):
        vae = family.vae_class()(**family.vae_config)
    if family.vae_class().__name__ == "AutoencoderKLFlux2":
        assert sum(p.numel() for p in vae.parameters()) == 84_046_115
        assert vae.bn.running_mean.shape == (known.rank,)


@pytest.mark.parametrize("alias", sorted(KEYS))
def test_lora_targets_match_linears_of_their_own(alias):
    """Every pattern matches Linear modules, never q, k, v, a norm, or what is trained in full."""
    known = KNOWN[alias]
    family = family_of(known.transformer_class)
    modules = dict(meta(known.transformer_class, config_of(alias)).named_modules())
    for pattern in family.lora_targets:
        matched = [name for name in modules if re.fullmatch(pattern, name)]
        assert matched, f"{pattern} matches nothing"
        assert all(isinstance(modules[name], torch.nn.Linear) for name in matched)
        assert not any(re.search(r"to_[qkv]|add_|norm", name) for name in matched)
        fully = {*family.projections.inputs, family.projections.output, family.projections.modulation}
        assert not fully & set(matched)


def test_klein_9b_lora_targets_are_those_of_the_released_adapter():
    alias = "flux2-klein-9b"
    known = KNOWN[alias]
    family = family_of(known.transformer_class)
    modules = [name for name, _ in meta(known.transformer_class, config_of(alias)).named_modules()]
    expected = {
        f"transformer_blocks.{i}.{ff}.linear_{way}"
        for i in range(8)
        for ff in ("ff", "ff_context")
        for way in ("in", "out")
    }
    expected |= {f"single_transformer_blocks.{i}.attn.to_out" for i in range(24)}
    expected |= {f"time_guidance_embed.timestep_embedder.linear_{i}" for i in (1, 2)}
    assert {name for name in modules if any(re.fullmatch(p, name) for p in family.lora_targets)} == expected
