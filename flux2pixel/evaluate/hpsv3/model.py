"""HPSv3's reward model: Qwen2-VL with a small head at one special token.

Protocol: the ``hpsv3`` 1.0.0 package with transformers 4.45. Two things decide the number. Positions are plain 0..L-1
on all three axes of M-RoPE: the official forward never computes the 3-D positions of image tokens. And the head reads
the final hidden state at the reward token alone, so that what follows it is cut off here: attention is causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2pixel.evaluate.hpsv3 import inputs
from flux2pixel.evaluate.precision import exact_float32
from flux2pixel.evaluate.suite import Rgb
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

UNUSED = "lm_head.weight"  # in the checkpoint, of no effect on the score


class RewardModel(nn.Module):
    """Qwen2-VL without its language head, and the reward head; ``config`` is transformers' `Qwen2VLConfig`."""

    def __init__(self, config: Any):
        super().__init__()
        from transformers import Qwen2VLModel

        self.backbone = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, grids: Tensor, reward_token: int) -> Tensor:
        """Score a batch: (B, 2) of mu and log sigma, in float32.

        ``ids`` and ``mask`` (B, L) padded on the right, one reward token in each row; ``pixels`` (P, 1176) and
        ``grids`` (B, 3) as Qwen2-VL packs images.
        """
        language = self.backbone.language_model
        embedded = language.embed_tokens(ids)
        seen = self.backbone.visual(pixels.to(embedded.dtype), grid_thw=grids).pooler_output
        image = ids == self.backbone.config.image_token_id
        embedded = embedded.masked_scatter(image[..., None], seen.to(embedded.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        hidden = language(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        at = (ids == reward_token).int().argmax(1)
        return self.rm_head(hidden[torch.arange(len(ids), device=ids.device), at].float())


def rename(key: str) -> str | None:
    """Name a key of the official file in `RewardModel`; None for the unused language head.

    Raises Flux2PixelError for any other: every tensor of the file is accounted for.
    """
    if key == UNUSED:
        return None
    for source, target in (("visual.", "backbone.visual."), ("model.", "backbone.language_model."), ("rm_head.",) * 2):
        if key.startswith(source):
            return target + key.removeprefix(source)
    raise Flux2PixelError(f"{key}: not a key of HPSv3.safetensors; take the file of MizzenAI/HPSv3")


def build(config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> RewardModel:
    """Make the model of the official file's tensors without a second copy; Flux2PixelError unless every key fits.

    The vocabulary is that of the file: the tokenizer's words and the reward token. The head is kept in float32.
    """
    from accelerate import init_empty_weights

    embedding = weights.get("model.embed_tokens.weight")
    if embedding is None:
        raise Flux2PixelError("model.embed_tokens.weight: missing; take HPSv3.safetensors of MizzenAI/HPSv3")
    config.text_config.vocab_size = len(embedding)
    with init_empty_weights(include_buffers=False):  # the rotary tables are buffers outside the checkpoint
        model = RewardModel(config)
    state = {}
    for key in weights:
        if name := rename(key):
            state[name] = weights[key].to(torch.float32 if name.startswith("rm_head.") else dtype)
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    resized = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another size", resized)):
        if names:
            raise Flux2PixelError(
                f"HPSv3: {len(names)} weights {what}, such as {names[0]}; do file and config belong together?"
            )
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def load(
    weights: Path,
    backbone: Path,
    instruction: Path,
    device: str | torch.device = "cpu",
    source: Mapping[str, str] | None = None,
) -> Reward:
    """Open HPSv3: its safetensors file, the folder of Qwen2-VL-7B-Instruct's config and tokenizer, the instruction.

    ``source`` (digests) goes into the provenance. Raises UsageError for a file that is absent or not the protocol's.
    """
    from transformers import AutoTokenizer, Qwen2VLConfig

    if not (backbone / "config.json").is_file():
        raise UsageError(f"{backbone}: no Qwen2-VL config there; `flux2pixel eval --suite hpsv3 --fetch` gets it")
    text = inputs.read_instruction(instruction)
    tensors, metadata = files.read_tensors(weights)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = build(Qwen2VLConfig.from_pretrained(backbone), tensors, dtype).to(device)
    words = AutoTokenizer.from_pretrained(backbone, local_files_only=True)
    words.add_special_tokens({"additional_special_tokens": [inputs.REWARD]})
    return Reward(model, words, text, {"weights": weights.name, **metadata, **(source or {})})


class Reward:
    """Scores images against texts: raw mu and sigma, no normalisation anywhere."""

    def __init__(self, model: RewardModel, words: Any, instruction: str, source: Mapping[str, Any]):
        self._model, self._words, self._instruction, self._source = model, words, instruction, dict(source)
        self._token = words.convert_tokens_to_ids(inputs.REWARD)
        rows = model.backbone.config.text_config.vocab_size
        if self._token != rows - 1:
            raise UsageError(f"the reward token is {self._token} in the tokenizer, but the weights have {rows} words")

    def tokens(self, prompt: str, image_tokens: int) -> list[int]:
        """Ids of the text up to the reward token, the image's place taken ``image_tokens`` times."""
        if special := [token for token in (inputs.REWARD, inputs.IMAGE_PAD) if token in prompt]:
            raise UsageError(f"prompt {prompt!r}: holds {special[0]}, which HPSv3 takes for its own; take it out")
        text = inputs.chat_text(self._instruction, prompt)
        before, after = text.split(inputs.IMAGE_PAD, 1)
        ids: list[int] = self._words(before + inputs.IMAGE_PAD * image_tokens + after, add_special_tokens=False)[
            "input_ids"
        ]
        return ids[: len(ids) - ids[::-1].index(self._token)]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Rgb], prompts: Sequence[str]) -> list[tuple[float, float]]:
        """Score each image against its prompt: ``(mu, sigma)`` each; mu is the reported score."""
        device = next(self._model.parameters()).device
        grids = [inputs.grid_of(image.shape[1], image.shape[0]) for image in images]
        rows = [self.tokens(p, inputs.image_tokens(g)) for p, g in zip(prompts, grids, strict=True)]
        longest = max(map(len, rows))
        pad = self._model.backbone.config.text_config.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        pixels = torch.cat([inputs.pack(inputs.shrink(image)) for image in images]).to(device)
        with exact_float32():
            out = self._model(ids, mask, pixels, torch.tensor(grids, device=device), self._token)
        return [(mu, sigma) for mu, sigma in zip(out[:, 0].tolist(), out[:, 1].exp().tolist(), strict=True)]

    def provenance(self) -> dict[str, Any]:
        """Say which weights, precision and libraries decide."""
        import transformers

        dtype = next(self._model.backbone.parameters()).dtype
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {
            "name": "official",
            "instruction_sha256": inputs.INSTRUCTION_SHA256,
            "dtype": str(dtype),
            **versions,
            **self._source,
        }
