"""Each family against its stock classes: the exact test in float64, packing, normalisation, guidance, refusals."""

import copy

import pytest
import torch
from families import TINY, write_base

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import exactness, fold
from flux2pixel.families.base import take
from flux2pixel.models.base import open_base
from flux2pixel.subspace.solvers import polar

FAMILIES = sorted(TINY)
GUIDED = ["flux2-klein", "sd3.5-large", "qwen-image", "z-image", "flux3", "flux1-dev"]
EDITING = ["flux2-klein", "flux2-dev", "flux3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: open_base(write_base(folder / name, name)) for name in FAMILIES}


def converted(base, scale=1.7):
    """The base's transformer and its pixel model in float64, with the basis that ties them."""
    latent = copy.deepcopy(base.transformer).double()
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(base.token_width, base.latent_width, dtype=torch.float64, generator=generator)
    flow = AsymFlow(polar(gaussian), scale)
    pixel = base.network_class()(**base.pixel_config(dict(latent.config))).double().eval()
    pixel.load_state_dict(fold(latent.state_dict(), flow.basis, base.projections, base.pixel_name))
    return latent, pixel, flow, generator


def error(base, grid=(2, 3), scale=1.7, guidance=None, references=(), **how):
    """The exact test's error with random text; ``references`` are grids of pictures to edit."""
    latent, pixel, flow, generator = converted(base, scale)
    cond = base.random_conditioning(base.config, 4, generator)
    if base.guidance == "embedded":
        cond["guidance"] = torch.tensor([1.0, 3.5, 7.0, 2.0], dtype=torch.float64)
    pictures = [
        (torch.randn(2, h * w, base.latent_width, generator=generator, dtype=torch.float64), (h, w))
        for h, w in references
    ]
    lifted = [(flow.lift(z) / flow.scale, shape) for z, shape in pictures]
    noise = torch.randn(2, grid[0] * grid[1], base.token_width, generator=generator, dtype=torch.float64)

    def network(model, edited):
        def call(tokens, time):
            if guidance is None:
                return base.call(model, tokens, time, take(cond, slice(2)), grid, edited)
            twice = [(torch.cat([z, z]), shape) for z, shape in edited]
            both = base.call(model, torch.cat([tokens, tokens]), time.repeat(2), cond, grid, twice)
            return base.guide(*both.chunk(2), guidance, **how)

        return call

    return exactness(network(latent, pictures), network(pixel, lifted), flow, noise, steps=16)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [(2, 3), (1, 7), (5, 2)])
def test_pixel_sampling_equals_latent_sampling(bases, name, grid):
    assert error(bases[name], grid) < 1e-9


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("scale", [0.4, 2.3])
def test_so_does_guided_sampling(bases, name, scale):
    assert error(bases[name], (3, 2), scale, guidance=4.0) < 1e-9


def test_so_does_z_image_with_its_guidance_normalised(bases):
    assert error(bases["z-image"], guidance=5.0, normalization=1.0) < 1e-9


@pytest.mark.parametrize("name", EDITING)
@pytest.mark.parametrize("guidance", [None, 3.5])
def test_so_does_editing(bases, name, guidance):
    guidance = guidance if bases[name].guidance == "cfg" else None
    assert error(bases[name], (2, 3), guidance=guidance, references=[(2, 2), (1, 3)]) < 1e-9
