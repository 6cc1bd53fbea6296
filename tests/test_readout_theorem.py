"""The theorem for every family in float64: whatever the readout, the latent trajectory stays the base's."""

from functools import partial

import pytest
import torch
from families import TINY, write_base
from test_bases import EDITING, FAMILIES, GUIDED, converted

from flux2pixel.asymflow.denoiser import Denoiser
from flux2pixel.asymflow.readout import Readout
from flux2pixel.asymflow.schedule import grid as time_grid
from flux2pixel.asymflow.solvers import SOLVERS, sample
from flux2pixel.convert.fold import Float64Throughout
from flux2pixel.families.base import take
from flux2pixel.models.base import open_base
from flux2pixel.models.features import Features
from flux2pixel.readout.gather import row_order, sign_of

GRID, STEPS, SCALE = (2, 3), 12, 1.7


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: open_base(write_base(folder / name, name)) for name in TINY}


class Pair:
    """A tiny base and its pixel model, with conditionings, pictures to edit and a random readout."""

    def __init__(self, base, guidance=None, references=()):
        self.base, self.guidance = base, guidance
        self.latent, self.pixel, self.flow, generator = converted(base, SCALE)
        self.cond = base.random_conditioning(base.config, 4, generator)
        if base.guidance == "embedded":
            self.cond["guidance"] = torch.tensor([1.0, 3.5, 7.0, 2.0], dtype=torch.float64)
        self.pictures = [
            (torch.randn(2, h * w, base.latent_width, generator=generator, dtype=torch.float64), (h, w))
            for h, w in references
        ]
        self.noise = torch.randn(2, 6, base.token_width, generator=generator, dtype=torch.float64)
        self.generator = generator

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def branches(self, network, pictures, features=None):
        def call(tokens, time):
            if self.guidance is None:
                return self.base.call(network, tokens, time, take(self.cond, slice(2)), GRID, pictures), None
            twice = [(torch.cat([z, z]), shape) for z, shape in pictures]
            both = self.base.call(network, torch.cat([tokens, tokens]), time.repeat(2), self.cond, GRID, twice)
            return both.chunk(2)

        def watched(tokens, time):
            if features is None:
                return call(tokens, time)
            with features:
                v, away = call(tokens, time)
            features.align(v, away)
            return v, away

        return watched

    def denoiser(self, readout=None):
        lifted = [(self.flow.lift(z) / self.flow.scale, shape) for z, shape in self.pictures]
        features = Features(self.base, self.pixel, 6)
        refine = readout.bind(GRID, partial(features.guided, scale=1.5)) if readout else None
        branches = self.branches(self.pixel, lifted, features)
        return Denoiser(branches, self.flow, self.guidance or 1.0, self.base.guide, readout=refine)

    def add_head(self):
        """Write a random head into the out-projection: the detail head's weight is outside of the subspace alone."""
        module = self.pixel.get_submodule(self.base.pixel_name(self.base.projections.output))
        head = self.random(len(self.flow.basis), module.weight.shape[1])
        head -= self.flow.basis @ (self.flow.basis.mT @ head)
        module.weight.data += head[row_order(self.base, len(head))]

    def readout(self, last):
        basis, channels = self.flow.basis, self.features_width()
        complement = torch.linalg.qr(torch.cat([basis, self.random(len(basis), 9)], 1))[0][:, basis.shape[1] :]
        parts = {"directions": complement, "variance": self.random(9).square()}
        if last:
            parts["last"] = self.random(9 * (channels + basis.shape[1] + 1), len(basis))
        return Readout(basis, **parts)

    def features_width(self):
        return self.pixel.get_submodule(self.base.pixel_name(self.base.projections.output)).weight.shape[1]


def trajectory(denoiser, start, levels, solver="euler"):
    states = []
    with Float64Throughout():
        sample(denoiser, start, levels, SOLVERS[solver], lambda i, x: states.append(x) or x)
    return states


def error(pair, last=True):
    taus = time_grid(STEPS, dtype=torch.float64)
    sigmas = pair.flow.sigma_of(taus)
    latent = Denoiser(pair.branches(pair.latent, pair.pictures), None, pair.guidance or 1.0, pair.base.guide)
    z = trajectory(latent, pair.noise @ pair.flow.basis, taus)
    pair.add_head()
    x = trajectory(pair.denoiser(pair.readout(last)), pair.noise, sigmas)
    steps = range(STEPS - 1 if last else STEPS)  # the last step changes what it ends in, on purpose
    worst = max(
        float((x[i] @ pair.flow.basis - z[i] / pair.flow.calibrate(sigmas[i + 1])[0]).abs().max()) for i in steps
    )
    outside = x[-2] - (x[-2] @ pair.flow.basis) @ pair.flow.basis.mT
    plain = sigmas[-2] * (pair.noise - (pair.noise @ pair.flow.basis) @ pair.flow.basis.mT)
    assert (outside - plain).abs().max() > 0.1, "the head and the prior do say something"
    return worst


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_latent_trajectory_is_the_bases(bases, name, last):
    assert error(Pair(bases[name]), last) < 1e-9


@pytest.mark.parametrize("name", GUIDED)
def test_so_it_is_with_guidance(bases, name):
    assert error(Pair(bases[name], guidance=4.0 if bases[name].guidance == "cfg" else None)) < 1e-9


@pytest.mark.parametrize("name", EDITING)
def test_so_it_is_with_pictures_to_edit(bases, name):
    guidance = 3.5 if bases[name].guidance == "cfg" else None
    assert error(Pair(bases[name], guidance, [(2, 2), (1, 3)])) < 1e-9


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_no_solver_tells_the_latents_apart(bases, solver):
    pair = Pair(bases["flux2-klein"], guidance=3.0)
    sigmas = pair.flow.sigma_of(time_grid(STEPS, dtype=torch.float64))
    converted_only = trajectory(pair.denoiser(), pair.noise, sigmas, solver)
    pair.add_head()
    read_out = trajectory(pair.denoiser(pair.readout(last=True)), pair.noise, sigmas, solver)
    for one, other in list(zip(converted_only, read_out, strict=True))[:-1]:
        assert ((one - other) @ pair.flow.basis).abs().max() < 1e-9
    assert ((converted_only[-1] - read_out[-1]) @ pair.flow.basis).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_out_projection_makes_v_of(bases, name):
    pair = Pair(bases[name])
    features = Features(pair.base, pair.pixel, 6)
    with Float64Throughout(), torch.no_grad():
        v, _ = pair.branches(pair.pixel, [], features)(pair.noise, torch.full((2,), 0.4, dtype=torch.float64))
    sign = sign_of(pair.base, pair.pixel, features.h, v)
    module = pair.pixel.get_submodule(pair.base.pixel_name(pair.base.projections.output))
    made = torch.empty_like(v)
    made[..., row_order(pair.base, v.shape[-1])] = sign * module(features.h)
    assert (made - v).abs().max() < 1e-9
