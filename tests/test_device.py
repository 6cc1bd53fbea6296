"""Drawing on a GPU, without one: fake tensors that claim to be on it refuse to meet any left on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.models.base import open_base
from flux2pixel.models.model import LatentModel, PixelModel, open_model, seeded_noise
from flux2pixel.models.sampler import base_sampler
from flux2pixel.runtime import device
from flux2pixel.runtime.errors import UsageError
from flux2pixel.weights.subspace import write_subspace

CUDA = torch.device("cuda", 0)


def moved(network: nn.Module) -> nn.Module:
    """Its tensors on CUDA; under FakeTensorMode."""
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty(value.shape, device=CUDA), requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return network


def on_gpu(solver: str, pixel: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    base = open_base("klein-tiny")
    sampler = base_sampler(base).changed({"steps": 3, "solver": solver, "shift": 32.0 if pixel else None})
    text, empty, noise = base.text(["a red circle"]), base.text([""]), seeded_noise([(0, 0)], 16, base.token_width)
    network, vae = base.transformer, base.vae
    if pixel:
        network = base.network_class().from_config(base.pixel_config(dict(network.config)))
    flow = AsymFlow(torch.eye(base.token_width)[:, : base.latent_width], 0.5)
    kind = PixelModel if pixel else LatentModel
    # The scheduler looks at its own numbers, which fake tensors do not have; the grid is moved by the caller.
    levels = kind(base, sampler, Codec(base.patch_size), flow=flow).levels((32, 32))
    monkeypatch.setattr(kind, "levels", lambda self, size: levels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        flow.basis, flow.scale = (torch.empty(value.shape, device=CUDA) for value in (flow.basis, flow.scale))
        for part in (network, vae):
            moved(part)
        model = kind(base, sampler, Codec(base.patch_size), flow=flow).with_network(network)
        return model(text, empty, noise, (32, 32))


@pytest.mark.filterwarnings("ignore:User provided device_type", "ignore:CUDA is not available")
@pytest.mark.parametrize("pixel", [False, True], ids=["base", "pixel"])
def test_a_model_draws_where_its_weights_are(pixel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = on_gpu("euler", pixel, monkeypatch)
    assert drawn.device == CUDA and drawn.shape == (1, 3, 32, 32)


def test_a_model_loads_to_the_device_asked_for(tmp_path: Path) -> None:
    """meta stands for the GPU: whatever is loaded goes there."""
    write_subspace(tmp_path / "subspace.safetensors", torch.eye(192)[:, :48], torch.tensor(1.0), {"method": "test"})
    model = open_model("klein-tiny", subspace=tmp_path / "subspace.safetensors", device="meta")
    assert {part.device.type for part in (model.base.transformer, model.base.vae, model)} == {"meta"}


def test_the_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.describe(device.choose()) == "the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "H100")
    assert device.choose() == device.choose("cuda") == CUDA and device.describe(CUDA) == "cuda:0 (H100)"
    assert device.choose("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.choose() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError, match="process 3 of this machine has no GPU: there are 2"):
        device.choose()


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose().type == "mps" and device.choose(float64=True).type == "cpu"
    with pytest.raises(UsageError, match="--device mps: this computes in float64"):
        device.choose("mps", float64=True)
    with pytest.raises(UsageError, match="--device gpu: unknown; give auto, cuda, mps, xpu or cpu"):
        device.choose("gpu")
    with pytest.raises(UsageError, match="--device cuda: PyTorch finds none"):
        device.choose("cuda")


def test_weights_keep_their_dtype_where_the_device_computes_in_it() -> None:
    cpu = torch.device("cpu")
    for where in (cpu, CUDA):
        assert device.default_dtype(where, torch.bfloat16) == torch.bfloat16
        assert device.default_dtype(where, torch.float64) == torch.float32
        assert device.default_dtype(where, torch.float8_e4m3fn) == torch.bfloat16
    assert device.default_dtype(CUDA, torch.float16) == torch.float16
    assert device.default_dtype(cpu, torch.float16) == torch.float32
