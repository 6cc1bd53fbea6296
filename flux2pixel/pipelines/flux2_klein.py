"""The diffusers pipeline of a pixel model made from FLUX.2 klein; a copy of this file travels in every such model.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` runs the copy, so this file imports nothing of
flux2pixel but the few modules that are copied beside it (method: AsymFlow, arXiv 2605.12964).

    B  images    N  tokens    D  pixel token width (3 p p)    h, w  token grid (height / p, width / p)
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from flux2pixel.asymflow.color import clamp_to_gamut, decode, encode
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.schedule import grid
from flux2pixel.asymflow.solvers import guide
from flux2pixel.asymflow.tokens import patchify, unpatchify

CARRIED = ("color", "method", "schedule", "solvers", "tokens")  # modules of flux2pixel.asymflow that travel along
REFERENCE_AREA = 1024 * 1024  # pixels; larger pictures to edit are reduced to it, as klein does
SIDE = 1024  # pixels along the side of an image whose size nobody named


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
        steps, guidance: what a call that names none takes.
        shift: of the noise levels, a t / (1 + (a - 1) t); 0 = as the latent base, whose shift depends on the number of
            tokens and steps.
        shift_side: pixels; if not 0, ``shift`` is meant for this side and scales with sqrt(height width) / side.
        orthogonal: whether the component of guidance parallel to x0_hat is removed.
        gamut_clamp: whether every x0_hat is clamped to colours a screen can show.
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
        shift: float = 0.0,
        shift_side: int = 0,
        orthogonal: bool = False,
        gamut_clamp: bool = False,
    ):
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
            shift_side=shift_side,
            orthogonal=orthogonal,
            gamut_clamp=gamut_clamp,
        )
        if not basis:
            raise ValueError("basis: missing; load a folder that flux2pixel wrote, whose model_index.json has it")
        self.flow = AsymFlow(unpack_basis(basis, 3 * patch_size**2), scale, sigma_min=sigma_min)
        self.vae_scale_factor = patch_size // 2  # klein's methods take twice this for the side of a token
        self.image_processor = Flux2ImageProcessor(vae_scale_factor=patch_size)

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
        described = json.loads(index.read_text()) | {"_class_name": ["asymflow_pipeline", "AsymFlowPipeline"]}
        index.write_text(json.dumps(described, indent=2) + "\n")
        copy_code(Path(save_directory))

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.config.items() if key != "basis"}
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
        height = _multiple(height or (pictures[0].shape[-2] if pictures else SIDE), patch)
        width = _multiple(width or (pictures[0].shape[-1] if pictures else SIDE), patch)
        shape = (height // patch, width // patch)
        noise = self._prepare_noise(latents, (batch, 3, height, width), generator, device)
        x = patchify(noise, patch)
        ids = [self._prepare_latent_ids(x.mT.unflatten(2, shape)).to(device)]
        reference = None
        if pictures:
            reference, places = self._prepare_references(pictures, batch, device)
            ids.append(places)
        image_ids = torch.cat(ids, dim=1)

        self._set_levels(sigmas, steps, height, width, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                sigma = self.scheduler.sigmas[i].to(device).expand(batch)
                x0 = self._clean(x, sigma, reference, branches, image_ids)
                if self.config.gamut_clamp:
                    x0 = patchify(clamp_to_gamut(unpatchify(x0, patch, height, width)), patch)
                velocity = (x - x0) / sigma.view(-1, 1, 1).clamp(min=self.config.sigma_min)
                x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    offered = {"latents": x, "prompt_embeds": branches[0][0]}
                    kept = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, timestep, kept)
                    x = changed.pop("latents", x)
                    branches[0] = (changed.pop("prompt_embeds", branches[0][0]), branches[0][1])
                progress.update()
        self._current_timestep = None

        picture = unpatchify(x, patch, height, width)
        if output_type != "latent":
            picture = self.image_processor.postprocess(decode(picture) * 2 - 1, output_type=output_type)
        self.maybe_free_model_hooks()
        return Flux2PipelineOutput(images=picture) if return_dict else (picture,)

    def _clean(
        self, x: Tensor, sigma: Tensor, reference: Tensor | None, branches: list[tuple[Tensor, Tensor]], ids: Tensor
    ) -> Tensor:
        """x0_hat (B, N, D) of noisy tokens, guided if there is a second branch; float32 but for the network."""
        k, tau = self.flow.calibrate(sigma)
        tokens = k.view(-1, 1, 1) * x
        if reference is not None:
            tokens = torch.cat([tokens, reference], dim=1)
        outputs = []
        for name, (embeds, text_ids) in zip(("cond", "uncond"), branches, strict=False):
            with self.transformer.cache_context(name):
                v = self.transformer(
                    hidden_states=tokens.to(self.transformer.dtype),
                    timestep=tau.to(self.transformer.dtype),
                    guidance=None,
                    encoder_hidden_states=embeds.to(self.transformer.dtype),
                    txt_ids=text_ids,
                    img_ids=ids,
                    joint_attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                )[0]
            outputs.append(v[:, : x.shape[1]].to(x.dtype))
        if len(outputs) == 1:
            return self.flow.predict_x0(outputs[0], x, sigma)
        conditional, unconditional = outputs
        if not self.config.orthogonal:
            v = unconditional + self.guidance_scale * (conditional - unconditional)
            return self.flow.predict_x0(v, x, sigma)
        clean, other = (self.flow.predict_x0(v, x, sigma) for v in outputs)
        return guide(clean, other, self.guidance_scale, orthogonal=True)

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
        return patchify(encode(picture), self.config.patch_size) / self.flow.scale.to(picture)

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

    def _set_levels(self, sigmas: Any, steps: int, height: int, width: int, device: torch.device) -> None:
        """Set the scheduler to the noise levels of this call. Raises ValueError if it changes them."""
        if sigmas is None:
            factor = self.config.shift
            if not factor:
                tokens = height * width // self.config.patch_size**2
                factor = np.exp(klein_mu(tokens, steps)) * float(self.flow.scale)
            if self.config.shift_side:
                factor *= (height * width) ** 0.5 / self.config.shift_side
            sigmas = grid(steps, float(factor), dtype=torch.float64)[:-1].tolist()
        self.scheduler.set_timesteps(sigmas=np.array(sigmas), device=device)
        kept = self.scheduler.sigmas[: len(sigmas)].double().cpu().numpy()
        if len(kept) != len(sigmas) or np.abs(kept - sigmas).max() > 1e-4:
            raise ValueError(
                f"scheduler: {type(self.scheduler).__name__} changes the noise levels it is given; "
                "set its shift to 1 and use_dynamic_shifting to False"
            )


def klein_mu(tokens: int, steps: int) -> float:
    """The logarithm of FLUX.2's time shift: linear in tokens, interpolated in steps below 4300 tokens."""
    many = 0.00016927 * tokens + 0.45666666  # as published for 200 steps
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # and for 10
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope


def pack_basis(basis: Tensor) -> str:
    """A matrix as base64 of its float32 values, little-endian, row by row."""
    return base64.b64encode(basis.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def unpack_basis(text: str, rows: int) -> Tensor:
    """The inverse of :func:`pack_basis` for a matrix of ``rows`` rows."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").reshape(rows, -1).copy())


def copy_code(folder: Path) -> None:
    """Write this file, and the modules it carries, into ``folder``: their own source, importing each other there."""
    here = Path(__file__)
    sources = {"asymflow_pipeline.py": here}
    sources |= {f"asymflow/{name}.py": here.parents[1] / "asymflow" / f"{name}.py" for name in CARRIED}
    for name, source in sources.items():
        text = source.read_text(encoding="utf-8")
        package = "." if name.startswith("asymflow/") else ".asymflow."
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("from flux2pixel.asymflow.", f"from {package}"), encoding="utf-8")


def _multiple(length: int, of: int) -> int:
    return length // of * of
