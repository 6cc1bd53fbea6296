"""The diffusers pipeline: loads without flux2pixel, draws what the latent base draws, keeps what diffusers gives."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, UniPCMultistepScheduler
from peft import LoraConfig

import flux2pixel
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.tokens import patchify
from flux2pixel.convert.run import convert
from flux2pixel.models.base import resolve
from flux2pixel.models.folder import read_folder, write_folder
from flux2pixel.models.model import open_model
from flux2pixel.pipelines.bundle import CODE, copy_code
from flux2pixel.pipelines.flux2_klein import AsymFlowPipeline, pack_basis, unpack_basis
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError
from flux2pixel.subspace.estimators import polar
from flux2pixel.weights.subspace import write_subspace

PROMPT = "a photo of a red circle"
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The miniature converted through a random basis: real text encoder, real transformer, any picture."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    basis = polar(torch.randn(192, 16, dtype=torch.float64))
    write_subspace(run / "subspace.safetensors", basis, torch.tensor(1.7), {"method": "random"})
    return convert(load(None, ["convert.verify_steps=1", "convert.dtype=fp32"]), run)


@pytest.fixture
def pipe(folder):
    loaded = AsymFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def picture():
    pixels = np.random.default_rng(5).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def draw(pipe, **named):
    call = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "pt"} | SIZE | named
    return pipe(generator=torch.Generator().manual_seed(3), **call).images


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flux2pixel":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
image = pipe(prompt="a photo of a red circle", height=32, width=48, num_inference_steps=4, output_type="pt",
             generator=torch.Generator().manual_seed(3)).images
torch.save(image, sys.argv[2])
assert not any(name.split(".")[0] == "flux2pixel" for name in sys.modules)
pipe.save_pretrained(sys.argv[3])
"""


def test_loads_and_draws_where_flux2pixel_is_not_installed(folder, pipe, tmp_path):
    """In another process that cannot import flux2pixel, from a moved folder; and what that process saves loads too."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    words = [sys.executable, "-c", WITHOUT, str(moved), str(tmp_path / "image.pt"), str(tmp_path / "saved")]
    home = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=home)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = draw(pipe)
    assert torch.allclose(torch.load(tmp_path / "image.pt"), expected, atol=1e-5)
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.float32)
    assert type(again).__module__.startswith("diffusers_modules")
    assert torch.allclose(draw(again), expected, atol=1e-5)


def test_the_installed_class_does_not_run_the_folders_code(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / f"{CODE}.py").write_text("raise SystemExit('ran')\n")
    assert isinstance(flux2pixel.AsymFlowPipeline.from_pretrained(moved), AsymFlowPipeline)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(moved)


def test_the_call_is_kleins():
    """Every argument of the latent pipeline, in its order; a negative prompt comes on top."""
    ours, theirs = (list(inspect.signature(cls.__call__).parameters) for cls in (AsymFlowPipeline, Flux2KleinPipeline))
    assert ours == [*theirs, "negative_prompt"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("references", [0, 2])
def test_draws_what_the_latent_pipeline_draws(pipe, guidance, references, monkeypatch):
    """Against diffusers' own Flux2KleinPipeline on the base: A^T x / s is its final latent, editing included.

    The noise of the one is the projection of the other's; pictures to edit enter as lifted latents, as the identity
    demands. An odd aspect ratio, real text; float32, as the scheduler computes.
    """
    klein = Flux2KleinPipeline.from_pretrained(resolve("klein-tiny"), dtype=torch.float32)
    klein.set_progress_bar_config(disable=True)
    basis, h, w = pipe.flow.basis, SIZE["height"] // 8, SIZE["width"] // 8
    noise = torch.randn(1, 3, *SIZE.values())
    z = (patchify(noise, 8) @ basis).mT.unflatten(2, (h, w))
    pictures = [torch.randn(1, 16, 5, 4), torch.randn(1, 16, 4, 7)][:references]
    image = [PIL.Image.new("RGB", (8 * p.shape[3], 8 * p.shape[2])) for p in pictures] or None
    final = {}

    def keep(which):
        return lambda pipeline, step, time, tensors: final.update({which: tensors["latents"]}) or {}

    encoded, lifted = iter(pictures), iter(pictures)
    monkeypatch.setattr(klein, "_encode_vae_image", lambda image, generator: next(encoded))
    monkeypatch.setattr(klein.image_processor, "check_image_input", lambda image: image)
    monkeypatch.setattr(pipe, "_reference_tokens", lambda picture: next(lifted).flatten(2).mT @ basis.mT)
    call = {"prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": guidance, "image": image} | SIZE
    klein(latents=z, max_sequence_length=12, output_type="latent", callback_on_step_end=keep("latent"), **call)
    matched = pipe.flow.sigma_of(torch.linspace(1, 0, 7))[:-1].tolist()
    pipe(latents=noise, sigmas=matched, output_type="latent", callback_on_step_end=keep("pixel"), **call)
    x, z = final["pixel"], final["latent"]
    size = z.abs().max()
    assert (x @ basis / pipe.flow.scale - z).abs().max() < 3e-5 * size
    assert (x - x @ basis @ basis.mT).abs().max() < 3e-5 * size


def test_a_picture_to_edit_changes_the_result(pipe, picture):
    plain, edited = draw(pipe), draw(pipe, image=picture)
    assert (plain - edited).abs().mean() > 1e-3
    other = PIL.Image.fromarray(255 - np.asarray(picture))
    assert (draw(pipe, image=other) - edited).abs().mean() > 1e-3
    assert draw(pipe, image=[picture, other], height=None, width=None).shape[-2:] == (40, 48), "sized as the first"
    with pytest.raises(ValueError, match="too small"):
        draw(pipe, image=PIL.Image.new("RGB", (16, 64)))


def test_the_final_picture_is_the_decoded_tokens(pipe):
    """No patch seams, no lost colour transform: "latent" decoded by hand is "pt", and the sizes are whole tokens."""
    from flux2pixel.asymflow.color import decode

    raw = draw(pipe, output_type="latent")
    assert raw.shape == (1, 3, 32, 48)
    assert torch.allclose(decode(raw).clamp(0, 1), draw(pipe), atol=1e-6)
    assert draw(pipe, output_type="pil")[0].size == (48, 32)


def test_batches_negative_prompts_and_generators(pipe):
    prompts = [PROMPT, "a photo of a blue square"]
    seeds = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)]
    two = pipe(prompt=prompts, num_inference_steps=4, output_type="pt", generator=seeds, **SIZE).images
    assert torch.allclose(two[0], draw(pipe)[0], atol=1e-4), "an image does not depend on its batch"
    assert (two[0] - two[1]).abs().mean() > 1e-3
    assert draw(pipe, num_images_per_prompt=2).shape[0] == 2
    assert (draw(pipe, negative_prompt="a photo of a red circle") - draw(pipe)).abs().mean() > 1e-4
    with pytest.raises(ValueError, match="a list of 1 for 2 images"):
        pipe(prompt=prompts, generator=seeds[:1], **SIZE)
    with pytest.raises(ValueError, match="noise of the image itself"):
        draw(pipe, latents=torch.zeros(1, 16, 4, 6))


def test_a_distilled_base_is_not_guided(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    index = json.loads((moved / "model_index.json").read_text())
    (moved / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    distilled = AsymFlowPipeline.from_pretrained(moved)
    assert torch.allclose(draw(distilled, guidance_scale=5.0), draw(distilled, guidance_scale=1.0), atol=1e-5)


def test_callbacks_see_and_change_every_step(pipe):
    seen = []

    def stop_moving(pipeline, step, time, tensors):
        seen.append((step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = draw(pipe, callback_on_step_end=stop_moving, output_type="latent")
    assert seen == [(step, (1, 24, 192)) for step in range(4)] and not out.any()


def test_schedulers_can_be_exchanged_and_must_not_shift(pipe):
    euler = draw(pipe, num_inference_steps=30)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    assert (draw(pipe, num_inference_steps=30) - euler).abs().mean() < 0.1
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=3.0)
    with pytest.raises(ValueError, match="changes the noise levels"):
        draw(pipe)


def test_a_finetuned_folder_uses_its_own_sampler(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    model = read_folder(moved)
    said = {"steps": 5, "guidance": 2.0, "solver": "unipc", "orthogonal": True, "gamut_clamp": True}
    write_folder(moved, replace(model, sampler=model.sampler.changed(said)), load())
    tuned = AsymFlowPipeline.from_pretrained(moved)
    assert isinstance(tuned.scheduler, UniPCMultistepScheduler)
    assert (tuned.config.steps, tuned.config.guidance) == (5, 2.0) and tuned.config.orthogonal
    raw = draw(tuned, output_type="latent", num_inference_steps=None)
    assert tuned.num_timesteps == 5 and torch.isfinite(raw).all()


def test_noise_levels_follow_the_size(folder, pipe):
    """The model's own shift, stated at 1024 x 1024; at the base's size it is the base's schedule on matched levels."""
    pipe.register_to_config(shift=17.0)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    for side, shift in ((32, 17 / 32), (64, 17 / 16)):
        seen = draw_levels(pipe, height=side, width=side)
        assert torch.allclose(seen, shift * t / (1 + (shift - 1) * t))
    own = AsymFlowPipeline.from_pretrained(folder)
    assert torch.allclose(draw_levels(own, height=32, width=32), own.flow.sigma_of(t))


def draw_levels(pipe, **size):
    """The noise levels that a call of four steps draws on."""
    draw(pipe, num_inference_steps=4, **size)
    return pipe.scheduler.sigmas


def test_the_basis_survives_any_cast(folder):
    half = AsymFlowPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and half.flow.basis.dtype == torch.float32
    assert torch.isfinite(draw(half)).all()
    basis = torch.randn(12, 5)
    assert torch.equal(unpack_basis(pack_basis(basis), 12), basis)
    assert isinstance(half.flow, AsymFlow) and "basis" not in repr(half)


def test_a_folder_draws_any_size_of_whole_tokens(folder):
    model = open_model(folder, load(None, ["sample.steps=1"]).sample)
    assert model.generate(PROMPT, size=(24, 48))[0].size == (48, 24)
    with pytest.raises(UsageError, match="multiples of 8"):
        model.generate(PROMPT, size=(24, 50))


def test_a_setting_that_is_written_is_honoured_on_a_converted_folder(folder):
    """Orthogonal guidance and the gamut clamp change the picture of a folder that by itself has neither."""
    plain, said = open_model(folder), open_model(folder, load(None, ["sample.orthogonal=true"]).sample)
    assert not plain.sampler.orthogonal and not plain.sampler.gamut_clamp and said.sampler.orthogonal
    first, second = (np.asarray(model.generate(PROMPT)[0], dtype=int) for model in (plain, said))
    assert abs(first - second).max() > 0


# What diffusers gives to the stock transformer --------------------------------------------------------------------


def test_lora_files_load_act_and_unload(pipe, tmp_path):
    plain = draw(pipe)
    layers = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_qkv_mlp_proj"], init_lora_weights=False)
    pipe.transformer.add_adapter(layers, "x")
    expected = draw(pipe)
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="x")
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    pipe.transformer.delete_adapters("x")
    assert torch.allclose(draw(pipe), plain)
    pipe.load_lora_weights(tmp_path)
    assert torch.allclose(draw(pipe), expected, atol=1e-4) and (expected - plain).abs().mean() > 1e-3
    pipe.set_adapters(pipe.get_active_adapters(), [0.0])
    assert torch.allclose(draw(pipe), plain, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.allclose(draw(pipe), plain, atol=1e-5)


def test_model_cpu_offload(pipe):
    """On a machine without an accelerator the CPU stands in for one: the hooks are there, fire, and change nothing."""
    plain = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    moves = []
    for name in ("text_encoder", "transformer"):
        hook = getattr(pipe, name)._hf_hook
        before = hook.pre_forward
        hook.pre_forward = lambda *given, name=name, before=before, **named: (
            moves.append(name) or before(*given, **named)
        )
    assert torch.allclose(draw(pipe), plain, atol=1e-5)
    assert moves[0] == "text_encoder" and moves.count("transformer") == 8, "4 steps, two branches"
    assert len(pipe._all_hooks) == 2


def test_compiled_transformer(pipe):
    from torch._dynamo.testing import CompileCounter

    plain, counter = draw(pipe), CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    assert torch.allclose(draw(pipe), plain, atol=1e-4)
    assert 0 < counter.frame_count < 8, "compiled, and not anew at every step"


def test_attention_back_ends(pipe, monkeypatch):
    from diffusers.models import attention_dispatch

    plain, called = draw(pipe), []
    registry = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    function = registry[name]
    # diffusers makes the chosen back end every later model's, too.
    chosen = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(chosen, "_active_backend", chosen._active_backend)
    monkeypatch.setitem(registry, name, lambda *given, **named: called.append(1) or function(*given, **named))
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.allclose(draw(pipe), plain, atol=1e-4)
    assert len(called) == 8 * 7, "every block of every forward went through it"


def test_weights_stored_in_eight_bits(pipe):
    plain = draw(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = [p.dtype for n, p in pipe.transformer.named_parameters() if "attn.to_q" in n or "ff.linear" in n]
    assert stored and set(stored) == {torch.float8_e4m3fn}
    assert 0 < (draw(pipe) - plain).abs().mean() < 0.1


def test_quantised_loading(folder, pipe):
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    small = AsymFlowPipeline.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    small.set_progress_bar_config(disable=True)
    weight = small.transformer.transformer_blocks[0].attn.to_q.weight
    assert "torchao" in type(weight).__module__
    assert 0 < (draw(small) - draw(pipe)).abs().mean() < 0.1


def test_the_copy_stands_alone(tmp_path):
    """One file with the method's own source in it, which imports nothing of flux2pixel and defines no name twice."""
    import ast

    from diffusers.utils.dynamic_modules_utils import get_relative_imports

    from flux2pixel.pipelines import flux2_klein

    copy_code(tmp_path, Path(flux2_klein.__file__))
    (copied,) = tmp_path.iterdir()
    source = copied.read_text()
    assert not get_relative_imports(copied) and "from flux2pixel" not in source and "import flux2pixel" not in source
    body = ast.parse(source).body
    names = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names += [
        target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if hasattr(target, "id")
    ]
    assert len(names) == len(set(names)) and {"Denoiser", "sample", "AsymFlowPipeline"} <= set(names)
