"""Bases that register themselves: found by name, opened like any other, and named when their package is broken."""

from importlib.metadata import EntryPoint

import pytest
import torch
from families import write_base

from flux2pixel.families import registry
from flux2pixel.families.known import KNOWN, base_names
from flux2pixel.models.base import open_base, published, resolve
from flux2pixel.runtime.errors import UsageError

mine = None  # what the entry point of these tests names


@pytest.fixture
def registered(monkeypatch):
    point = EntryPoint("my-base", "test_bases_registry:mine", registry.GROUP)
    monkeypatch.setattr(registry, "_found", lambda: {"my-base": point})


def test_the_bundled_base_is_registered_by_the_package():
    plugin = registry.plugin("klein-tiny")
    assert plugin is not None and (plugin.folder / "transformer" / "config.json").is_file()
    assert base_names() == [*registry.names(), *KNOWN]
    assert registry.plugin("flux2-klein-4b") is None


def test_a_base_of_another_package_opens_by_its_name(registered, monkeypatch, tmp_path):
    folder = write_base(tmp_path / "base", "z-image")
    monkeypatch.setattr("test_bases_registry.mine", registry.Plugin("my-base", folder))
    assert resolve("my-base") == folder and open_base("my-base").family == "z-image"
    assert registry.names() == ["my-base"]


def test_what_is_registered_and_is_no_base_is_named(registered, monkeypatch):
    with pytest.raises(UsageError, match="'my-base' is registered by test_bases_registry:mine, which is no flux2pixel"):
        resolve("my-base")
    monkeypatch.delattr("test_bases_registry.mine")
    with pytest.raises(UsageError, match="which fails"):
        resolve("my-base")


def test_weights_load_in_the_dtype_they_are_stored_in_where_there_is_an_accelerator(tmp_path):
    """meta stands for the GPU. On the CPU, and where asked for, they are float32; the VAE is, unless told otherwise."""
    folder = write_base(tmp_path / "base", "z-image")
    torch.set_default_dtype(torch.float32)
    half = open_base(folder).transformer.half()
    half.save_pretrained(folder / "transformer")
    assert open_base(folder).transformer.dtype == torch.float32
    there = open_base(folder, device="meta")
    assert (there.transformer.dtype, there.transformer.device.type) == (torch.float16, "meta")
    assert (there.vae.dtype, there.vae.device.type) == (torch.float32, "meta")
    assert open_base(folder, torch.float32, device="meta").transformer.dtype == torch.float32
    assert open_base(folder, device="meta", vae_dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert open_base(folder).device.type == "cpu", "no base is moved by another"


def test_a_published_base_is_known_without_a_file():
    base = published(KNOWN["sd3.5-large"])
    assert (base.patch_size, base.latent_width, base.guidance) == (16, 64, "cfg")
    assert base.config["dual_attention_layers"] == []
