"""The whole finetune stage on a GPU, without one: its tensors claim to be on CUDA and refuse to meet any on the CPU.

No device is set here: the stage chooses it, as it would on a machine with a GPU. Fake tensors hold no numbers, so the
finished model is not written.
"""

import shutil

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Numbers, fake, pretend, real
from finetuning import small

from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune import build, prepare
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.network import export
from flux2pixel.finetune.step import objective
from flux2pixel.finetune.watch import samples
from flux2pixel.models.base import Base


class Generator(torch.Generator):
    """Says that it is CUDA's, which cannot be made here."""

    device = CUDA

    def __new__(cls, device):
        return super().__new__(cls, device="cpu")


@pytest.mark.filterwarnings("ignore:User provided device_type", "ignore:CUDA is not available")
def test_the_whole_stage_runs_where_the_process_computes(prepared_run, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    recipe = small("finetune.steps=2", "finetune.save_every=9", "finetune.validate_every=1")
    with monkeypatch.context() as patched:
        prepare.prepare(recipe, folder)  # with no GPU about: it would encode on it
        pretend(patched)
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
        with fake(numbers):
            stage.finetune(recipe, folder, prepared=True)
    assert trained == [{CUDA}] * 2
    assert [image.shape for image in drawn] == [(1, 32, 32, 3)] * 2 and drawn[0].dtype == np.uint8
    assert {t.device.type for t in written[0]["ema"].values()} == {"cpu"}
    assert sorted(path.name for path in (folder / "samples").glob("step-*")) == [
        "step-00000000.png",
        "step-00000002.png",
    ]
