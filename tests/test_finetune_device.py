"""The whole finetune stage on a GPU, without one: its tensors claim to be on CUDA and refuse to meet any on the CPU.

No device is set here: the stage chooses it, as it would on a machine with a GPU. Fake tensors hold no numbers, so what
asks for a number is given ones; files are read as real tensors, and the finished model is not written. Autograd's
engine wants a driver for each device, so a backward only gives every trained parameter a gradient where it lies.
"""

import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from finetuning import small
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune import build, prepare
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.network import export
from flux2pixel.finetune.step import objective
from flux2pixel.finetune.watch import samples
from flux2pixel.models.base import Base

CUDA = torch.device("cuda", 0)


class Numbers(TorchFunctionMode):
    """Whoever asks a fake tensor for its numbers gets ones; ``asked`` has the devices of those that were asked."""

    ASKS = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.__float__, torch.Tensor.__bool__)

    trained: Sequence[torch.Tensor] = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward:
            assert args[0].requires_grad and args[0].device == CUDA
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            return None
        if func in self.ASKS and isinstance(args[0], FakeTensor):
            if func is torch.Tensor.numpy:
                assert args[0].device.type == "cpu", "NumPy reads host memory"
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                return func(torch.ones(args[0].shape, dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


class Mode(FakeTensorMode):
    """Never asks a driver, whatever is said to be available."""

    avoid_device_init = True


class Generator(torch.Generator):
    """Says that it is CUDA's, which cannot be made here."""

    device = CUDA

    def __new__(cls, device):
        return super().__new__(cls, device="cpu")


def real(function):
    """The function outside the fake mode: it reads files."""

    def outside(*args, **options):
        with unset_fake_temporarily():
            return function(*args, **options)

    return outside


@pytest.mark.filterwarnings("ignore:User provided device_type", "ignore:CUDA is not available")
def test_the_whole_stage_runs_where_the_process_computes(prepared_run, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    recipe = small("finetune.steps=2", "finetune.save_every=9", "finetune.validate_every=1")
    with monkeypatch.context() as patched:
        prepare.prepare(recipe, folder)  # with no GPU about: it would encode on it
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 1)
        patched.setattr(torch.cuda, "get_device_name", lambda place: "some GPU")
        patched.setattr(torch.cuda, "max_memory_allocated", lambda place: 0)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patched.setattr(Batch, "pin", lambda batch: batch)
        patched.setattr(objective, "Generator", Generator)
        patched.setattr(Base, "load", real(Base.load))
        for module, name in ((stage, "open_source"), (stage, "open_data"), (samples, "seeded_noise")):
            patched.setattr(module, name, real(getattr(module, name)))
        patched.setattr(Cache, "load", real(Cache.load))
        patched.setattr(Cache, "text", real(Cache.text))
        patched.setattr(build, "prepare", real(build.prepare))
        numbers, drawn, trained = Numbers(), [], []
        sampled, advance = samples.Samples.__call__, build.Trainer.advance
        patched.setattr(
            samples.Samples, "__call__", lambda self, network: drawn.append(sampled(self, network)) or drawn[-1]
        )

        def advanced(self, batches):
            numbers.trained = self.trained
            trained.append({t.device for b in batches for t in (b.rgb, b.latents, *b.conditioning.values())})
            return advance(self, batches)

        patched.setattr(build.Trainer, "advance", advanced)
        written = []
        patched.setattr(export, "write_model", lambda *args: written.append(args[3]))
        patched.setattr(export, "write_card", lambda *args: None)
        swap = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with numbers, Mode(allow_non_fake_inputs=True):
                stage.finetune(recipe, folder, prepared=True)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(swap)
    assert trained == [{CUDA}] * 2
    assert [image.shape for image in drawn] == [(1, 32, 32, 3)] * 2 and drawn[0].dtype == np.uint8
    assert {t.device.type for t in written[0]["ema"].values()} == {"cpu"}
    assert sorted(path.name for path in (folder / "samples").glob("step-*")) == [
        "step-00000000.png",
        "step-00000002.png",
    ]
