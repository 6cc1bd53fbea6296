"""The diffusers pipeline of a pixel model made from FLUX.2 klein; a copy of it travels in every such model.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` runs the copy, into which :func:`bundle` puts the
source of the method's modules, so the denoiser and the sampling loop are the package's own (AsymFlow, 2605.12964).

    B  images    N  tokens    D  pixel token width (3 p p)    h, w  token grid (height / p, width / p)
"""

from __future__ import annotations

import base64
import importlib
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Generator, Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.denoiser import Denoiser
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.readout import Readout
from flux2pixel.asymflow.schedule import noise_levels
from flux2pixel.asymflow.solvers import sample, scheduled
from flux2pixel.asymflow.tokens import patchify

TENSORS = "asymflow.safetensors"
REFERENCE_AREA = 1024 * 1024  # pixels; larger pictures to edit are reduced to it, as klein does


class AsymFlowPipeline(Flux2KleinPipeline):
    """Text (and pictures to edit) to image in pixel space: FLUX.2 klein's own pipeline without its VAE.

    Args:
        scheduler: a flow-matching scheduler that takes ``sigmas`` and does not shift them itself.
        transformer: the stock class with D channels in and out; all that works on it (LoRA, quantisation, compiling,
            offloading, attention back ends) works here.
        basis: the patch basis A, (D, r), float32, row by row, as base64; kept in the configuration so that no cast of
            the model touches it.
        scale: s, see AsymFlow.
        patch_size: p, pixels along the side of a token.
        sigma_min: floor of the noise level when a velocity is asked for.
        is_distilled: guidance is off, as in the base.
        steps, guidance, height, width: what a call that names none takes.
        shift: a factor of the noise levels at 1024 x 1024, which grows with the square root of the image's area.
        orthogonal: whether the component of guidance parallel to x0_hat is removed.
        gamut_clamp: whether every x0_hat is clamped to colours a screen can show.
        offset: of the pixel space, (D,), as base64; none if empty.
        readout: whether ``asymflow.safetensors`` beside this configuration holds a texture prior or a last step.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        scheduler: Any,
        text_encoder: Qwen3ForCausalLM,
        tokenizer: Qwen2TokenizerFast,
        transformer: Flux2Transformer2DModel,
        basis: str = "",
        scale: float = 1.0,
        patch_size: int = 16,
        sigma_min: float = 1e-4,
        is_distilled: bool = False,
        steps: int = 50,
        guidance: float = 4.0,
        shift: float = 17.0,
        orthogonal: bool = False,
        gamut_clamp: bool = False,
        height: int = 1024,
        width: int = 1024,
        offset: str = "",
        readout: bool = False,
        shift_side: int | None = None,
    ):
        if shift_side is not None:
            raise ValueError("shift_side: of flux2pixel 0.1; load its folder with trust_remote_code, or convert again")
        super(Flux2KleinPipeline, self).__init__()
        self.register_modules(
            scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
        self.register_to_config(
            basis=basis,
            scale=scale,
            patch_size=patch_size,
            sigma_min=sigma_min,
            is_distilled=is_distilled,
            steps=steps,
            guidance=guidance,
            shift=shift,
            orthogonal=orthogonal,
            gamut_clamp=gamut_clamp,
            height=height,
            width=width,
            offset=offset,
            readout=readout,
        )
        if not basis:
            raise ValueError("basis: missing; load a folder that flux2pixel wrote, whose model_index.json has it")
        self.flow = AsymFlow(unpack_basis(basis, 3 * patch_size**2), scale, sigma_min=sigma_min)
        self.codec = Codec(patch_size, unpack_basis(offset, 3 * patch_size**2).flatten() if offset else None)
        self.vae_scale_factor = patch_size // 2  # klein's methods take twice this for the side of a token
        self.image_processor = Flux2ImageProcessor(vae_scale_factor=patch_size)

    @cached_property
    def readout(self) -> Readout | None:
        """What a readout adds at sampling time, from the folder or repository that the pipeline was loaded from."""
        return Readout.from_tensors(self.flow.basis, load_file(self._tensors())) if self.config.readout else None

    def _tensors(self) -> Path:
        home = Path(str(self.config._name_or_path))
        return home / TENSORS if home.is_dir() else Path(hf_hub_download(str(home), TENSORS))

    @classmethod
    def load_config(cls, *given: Any, **named: Any) -> Any:
        """As in diffusers; the class asked for is this one, so the copy in the folder is not run."""
        config = super().load_config(*given, **named)
        for part in config if isinstance(config, tuple) else (config,):
            if isinstance(part, dict) and isinstance(part.get("_class_name"), list):
                part["_class_name"] = part["_class_name"][1]
        return config

    def save_pretrained(self, save_directory: str, *given: Any, **named: Any) -> None:
        """As in diffusers; the folder gets a copy of this file, and loads anywhere."""
        super().save_pretrained(save_directory, *given, **named)
        index = Path(save_directory) / self.config_name
        name, source = _travelling()
        described = {**json.loads(index.read_text()), "_class_name": [name, "AsymFlowPipeline"]}
        index.write_text(json.dumps(described, indent=2) + "\n")
        (Path(save_directory) / f"{name}.py").write_text(source, encoding="utf-8")
        if self.config.readout and not (Path(save_directory) / TENSORS).exists():
            shutil.copyfile(self._tensors(), Path(save_directory) / TENSORS)

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.config.items() if key not in ("basis", "offset")}
        return f"{type(self).__name__} {json.dumps(shown, indent=2, default=str)}"

    @torch.no_grad()
    def __call__(
        self,
        image: list[PIL.Image.Image] | PIL.Image.Image | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int | None = None,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
        negative_prompt: str | list[str] | None = None,
    ) -> Flux2PipelineOutput | tuple[Any]:
        """Draw images; the arguments are those of ``Flux2KleinPipeline``, with these differences.

        Args:
            num_inference_steps, guidance_scale: the model's own if not given.
            sigmas: pixel noise levels, from 1 downwards, without the final 0.
            latents: the noise, (B, 3, height, width), standard normal, to start from.
            negative_prompt: what guidance leads away from; "" if not given.
            max_sequence_length: text tokens; 512, or fewer if the tokenizer says so, if not given.
            output_type: "pil", "np", "pt", or "latent" for (B, 3, height, width) in the model's colour space.

        The tensor called ``latents`` in a callback is the noisy tokens, (B, N, D).
        """
        steps = num_inference_steps or self.config.steps
        scale = self.config.guidance if guidance_scale is None else guidance_scale
        self.check_inputs(
            prompt, height, width, prompt_embeds, list(callback_on_step_end_tensor_inputs), guidance_scale=scale
        )
        self._guidance_scale, self._attention_kwargs, self._interrupt = scale, attention_kwargs, False
        device = self._execution_device
        text = {
            "device": device,
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length or min(512, int(self.tokenizer.model_max_length)),
            "text_encoder_out_layers": text_encoder_out_layers,
        }
        branches = [self.encode_prompt(prompt=prompt, prompt_embeds=prompt_embeds, **text)]
        if self.do_classifier_free_guidance:
            count = branches[0][0].shape[0] // num_images_per_prompt
            avoid = [negative_prompt or ""] * count if not isinstance(negative_prompt, list) else negative_prompt
            branches.append(self.encode_prompt(prompt=avoid, prompt_embeds=negative_prompt_embeds, **text))
        batch = branches[0][0].shape[0]

        pictures = self._prepare_pictures(image)
        patch = self.config.patch_size
        height = _multiple(height or (pictures[0].shape[-2] if pictures else self.config.height), patch)
        width = _multiple(width or (pictures[0].shape[-1] if pictures else self.config.width), patch)
        noise = patchify(self._prepare_noise(latents, (batch, 3, height, width), generator, device), patch)
        ids = [self._prepare_latent_ids(noise.mT.unflatten(2, (height // patch, width // patch))).to(device)]
        reference = None
        if pictures:
            reference, positions = self._prepare_references(pictures, batch, device)
            ids.append(positions)
        if sigmas is None:
            levels = noise_levels(steps, self.config.shift, height, width).to(device)
        else:
            levels = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
        self._num_timesteps = len(levels) - 1
        features: list[Tensor] = []
        refine = None
        if self.readout is not None:
            push = self.readout.push(self.guidance_scale)
            grid = (height // patch, width // patch)
            refine = self.readout.to(device).bind(grid, lambda count: _guided(features, push))
        denoiser = Denoiser(
            self._branches(branches, reference, torch.cat(ids, dim=1), features if refine else None),
            self.flow,
            self.guidance_scale,
            orthogonal=self.config.orthogonal,
            clamp=(lambda x0: self.codec.clamp(x0, height, width)) if self.config.gamut_clamp else None,
            readout=refine,
        )
        with self.progress_bar(total=self._num_timesteps) as progress:

            def on_step(i: int, x: Tensor) -> Tensor:
                self._current_timestep = self.scheduler.timesteps[i]
                if callback_on_step_end is not None:
                    offered = {"latents": x, "prompt_embeds": branches[0][0]}
                    kept = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, self._current_timestep, kept)
                    x = changed.pop("latents", x)
                    branches[0] = (changed.pop("prompt_embeds", branches[0][0]), branches[0][1])
                progress.update()
                return x

            solver = self._interruptible(scheduled(self.scheduler, self.config.sigma_min))
            x = sample(denoiser, noise, levels, solver, on_step)
        self._current_timestep = None

        if output_type == "latent":
            picture = self.codec.image(x, height, width)
        else:
            rgb = self.codec.decode(x, height, width)
            picture = self.image_processor.postprocess(rgb * 2 - 1, output_type=output_type)
        self.maybe_free_model_hooks()
        return Flux2PipelineOutput(images=picture) if return_dict else (picture,)

    def _branches(
        self,
        texts: list[tuple[Tensor, Tensor]],
        reference: Tensor | None,
        ids: Tensor,
        features: list[Tensor] | None = None,
    ) -> Any:
        """The transformer with its conditionings; ``texts`` may change between steps.

        ``features`` is filled with what enters the out-projection, (B, N, C), a branch each, at every call.
        """

        def branches(inputs: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens = inputs if reference is None else torch.cat([inputs, reference], dim=1)
            outputs = []
            hook = None
            if features is not None:
                features.clear()
                hook = self.transformer.proj_out.register_forward_pre_hook(
                    lambda module, given: features.append(given[0][:, : inputs.shape[1]].float())
                )
            for name, (embeds, text_ids) in zip(("cond", "uncond"), texts, strict=False):
                with self.transformer.cache_context(name):
                    v = self.transformer(
                        hidden_states=tokens.to(self.transformer.dtype),
                        timestep=time,
                        guidance=None,
                        encoder_hidden_states=embeds.to(self.transformer.dtype),
                        txt_ids=text_ids,
                        img_ids=ids,
                        joint_attention_kwargs=self.attention_kwargs,
                        return_dict=False,
                    )[0]
                outputs.append(v[:, : inputs.shape[1]].to(inputs.dtype))
            if hook is not None:
                hook.remove()
            return outputs[0], outputs[1] if len(outputs) > 1 else None

        return branches

    def _interruptible(self, solver: Any) -> Any:
        """The solver, whose steps do nothing once a callback has interrupted the pipeline."""

        def made(sigmas: Tensor) -> Any:
            step = solver(sigmas)
            return lambda denoise, x, i: x if self.interrupt else step(denoise, x, i)

        return made

    def _prepare_pictures(self, image: list[PIL.Image.Image] | PIL.Image.Image | None) -> list[Tensor]:
        """Pictures to edit as sRGB in [0, 1], (1, 3, H, W), cropped to whole tokens."""
        patch, pictures = self.config.patch_size, []
        for picture in image if isinstance(image, list) else [] if image is None else [image]:
            self.image_processor.check_image_input(picture, min_side_length=4 * patch)
            if picture.width * picture.height > REFERENCE_AREA:
                picture = self.image_processor._resize_to_target_area(picture, REFERENCE_AREA)
            size = {"height": _multiple(picture.height, patch), "width": _multiple(picture.width, patch)}
            pictures.append(self.image_processor.preprocess(picture, resize_mode="crop", **size) / 2 + 0.5)
        return pictures

    def _prepare_references(self, pictures: list[Tensor], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens x / s (B, M, D) of pictures to edit, and their position ids (B, M, 4)."""
        patch = self.config.patch_size
        tokens = [self._reference_tokens(picture.to(device)) for picture in pictures]
        grids = [
            part.mT.unflatten(2, (picture.shape[-2] // patch, picture.shape[-1] // patch))
            for part, picture in zip(tokens, pictures, strict=True)
        ]
        ids = self._prepare_image_ids(grids).to(device)
        return torch.cat(tokens, dim=1).expand(batch, -1, -1), ids.expand(batch, -1, -1)

    def _reference_tokens(self, picture: Tensor) -> Tensor:
        """What the network sees of a picture to edit: (1, 3, H, W) sRGB in [0, 1] -> x / s, (1, M, D)."""
        tokens = self.codec.encode(picture)
        return tokens / self.flow.scale.to(tokens)

    def _prepare_noise(
        self, noise: Tensor | None, shape: tuple[int, ...], generator: Any, device: torch.device
    ) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator: a list of {len(generator)} for {shape[0]} images; give one for each")
        if noise is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents: shape {tuple(noise.shape)}, must be {shape}: noise of the image itself")
        return noise.to(device, torch.float32)


def pack_basis(basis: Tensor) -> str:
    """A matrix as base64 of its float32 values, little-endian, row by row."""
    return base64.b64encode(basis.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def unpack_basis(text: str, rows: int) -> Tensor:
    """The inverse of :func:`pack_basis` for a matrix of ``rows`` rows."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").reshape(rows, -1).copy())


def _guided(features: list[Tensor], scale: float) -> Tensor:
    """Features of both branches of guidance, guided by ``scale``; those of one as they are."""
    return features[0] if len(features) == 1 else features[1] + scale * (features[0] - features[1])


def _travelling() -> tuple[str, str]:
    """Name and source of the module that travels: this file, or what is bundled from it where flux2pixel is."""
    here = Path(__file__)
    if __name__.startswith("diffusers_modules"):
        return here.stem, here.read_text(encoding="utf-8")
    bundle = importlib.import_module("flux2pixel.pipelines.bundle")
    return bundle.CODE, bundle.bundle(here)


def _multiple(length: int, of: int) -> int:
    return length // of * of
