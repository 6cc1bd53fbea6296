"""One meaning of shift: training, eval, generate and the travelling pipeline draw on one grid, whatever the size."""

from types import SimpleNamespace

import pytest
import torch

from flux2pixel.asymflow import schedule
from flux2pixel.asymflow.linalg import polar
from flux2pixel.convert.run import convert
from flux2pixel.evaluate.columns import FlowDrawer
from flux2pixel.finetune.step.objective import draw
from flux2pixel.models import model as models
from flux2pixel.models.model import open_model
from flux2pixel.pipelines import flux2_klein
from flux2pixel.pipelines.flux2_klein import AsymFlowPipeline
from flux2pixel.recipe import load
from flux2pixel.weights.subspace import write_subspace

STEPS = 6
SIZES = [(512, 512), (1024, 1024), (2048, 2048), (768, 1376)]  # (height, width)


class Seen(Exception):
    """The grid that a sampling was about to begin on."""


def stop(denoiser, noise, sigmas, *rest, **named):
    raise Seen(sigmas.double())


@pytest.fixture(scope="module", params=[2.3, 1.0], ids=["s=2.3", "s=1"])
def run(request, tmp_path_factory):
    """A run of the miniature, converted through a random basis of this scale."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    basis = polar(torch.randn(192, 16, dtype=torch.float64))
    write_subspace(folder / "subspace.safetensors", basis, torch.tensor(request.param), {"method": "random"})
    convert(load(None, ["convert.verify_steps=1"], base="klein-tiny"), folder)
    return SimpleNamespace(folder=folder, scale=request.param)


def seen(call):
    with pytest.raises(Seen) as caught:
        call()
    return caught.value.args[0]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("shift", [17.0, 1.0])
def test_all_draw_on_one_grid(run, monkeypatch, shift, size):
    """Pixel grids are equal to the bit in float32; the matched latent grid, mapped to pixels, to float32 rounding; the
    training's noise levels are the same map of its own draws, to float32 rounding."""
    monkeypatch.setattr(models, "sample", stop)
    monkeypatch.setattr(flux2_klein, "sample", stop)
    said = [f"sample.shift={shift}", f"sample.steps={STEPS}"]
    recipe = load(None, said, base="klein-tiny")
    model = open_model(run.folder / "converted", recipe.sample)
    by_generate = seen(lambda: model.generate("a red circle", size=size))

    texts = SimpleNamespace(of=lambda encoder, prompts: {"text": torch.zeros(len(prompts), 12, 192)})
    place = torch.device("cpu")
    drawer = FlowDrawer(run.folder / "converted", recipe, run.folder, place, texts, "encoder").open()
    by_eval = seen(lambda: drawer.draw(["a red circle"], [(0, 0)], size))

    pipe = AsymFlowPipeline.from_pretrained(run.folder / "converted", dtype=torch.float32)
    pipe.register_to_config(shift=shift)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "height": size[0], "width": size[1], "num_inference_steps": STEPS}
    by_pipeline = seen(lambda: pipe(**call))
    assert torch.equal(by_generate, by_eval) and torch.equal(by_generate, by_pipeline)

    base = open_model("klein-tiny", recipe.sample, subspace=run.folder / "subspace.safetensors")
    latent = seen(lambda: base.generate("a red circle", size=size))
    assert (model.flow.sigma_of(latent.float()).double() - by_generate).abs().max() < 1e-6

    plain = draw(pictures(1024, 1024), 0, 1.0)[0]  # a factor of 1
    trained = draw(pictures(*size), 0, shift)[0]
    assert (trained.double() - schedule.shift(plain.double(), factor_of(by_generate))).abs().max() < 1e-5


def factor_of(levels):
    """The shift a of a grid: sigma = a / (1 + a) halfway."""
    middle = levels[STEPS // 2]
    return float(middle / (1 - middle))


def pictures(height, width):
    """A training batch of this size; one byte stands for all pixels, one token for all."""
    rgb = torch.zeros(1, dtype=torch.uint8).expand(64, 3, height, width)
    return SimpleNamespace(rgb=rgb, grid=(1, 1), patch_size=8, number=3)
