"""Who answers DPG-Bench's questions: the official mPLUG, or another model under another name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux2pixel.evaluate.dpg_bench.beam import search
from flux2pixel.evaluate.dpg_bench.mplug import Config, MPlug
from flux2pixel.evaluate.precision import exact_float32
from flux2pixel.evaluate.suite import Rgb
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
QUESTION_TOKENS = 25
WEIGHTS = "model.safetensors"


class Vqa(Protocol):
    """Answers questions about images; ``name`` is "official" only for the protocol's own judge."""

    @property
    def name(self) -> str:
        """Who answers."""

    def ask(self, images: Sequence[Rgb], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Answer all questions of each image."""

    def provenance(self) -> dict[str, Any]:
        """Say which weights, by digest, and which settings decide."""


def convert(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a loaded ``pytorch_model.bin`` ("model", then "module") and drop "model." and the momentum copies.

    Refuses, with Flux2PixelError, a language head that is not tied to the decoder's word embeddings.
    """
    for key in ("model", "module"):
        inner = state.get(key)
        state = inner if isinstance(inner, Mapping) else state
    tensors = {name.replace("model.", ""): value for name, value in state.items() if isinstance(value, Tensor)}
    kept = {name: value for name, value in tensors.items() if not name.split(".")[0].endswith("_m")}
    tied = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"
    if all(name in kept for name in tied) and not torch.equal(kept[tied[0]], kept[tied[1]]):
        raise Flux2PixelError(
            f"{tied[1]}: differs from the word embeddings it is tied to; take the official checkpoint"
        )
    return {name: value.float().contiguous() for name, value in kept.items()}


def load(folder: Path, device: str | torch.device = "cpu") -> MPlugJudge:
    """Open a converted mPLUG folder: config.yaml, config_bert.json, vocab.txt and model.safetensors.

    Raises UsageError if a file is absent or the vocabulary does not hold plain English, Flux2PixelError if a weight
    that the network needs is missing or of another size.
    """
    import yaml

    for name in ("config.yaml", "config_bert.json", "vocab.txt", WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: has no {name}; `flux2pixel eval --suite dpg-bench --fetch` makes it")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    weights, metadata = files.read_tensors(folder / WEIGHTS)
    bert = json.loads((folder / "config_bert.json").read_text(encoding="utf-8"))
    try:
        config = Config.read(bert, int(settings.get("image_res", 504)), weights)
    except KeyError as error:
        raise Flux2PixelError(
            f"{folder}: config_bert.json or the weights lack {error}; not an mPLUG VQA model"
        ) from error
    model, ignored = build(config, weights, folder)
    beams = {key: int(settings.get(key, default)) for key, default in BEAM_DEFAULTS.items()}
    source = {**metadata, "ignored_tensors": ignored, **beams}
    return MPlugJudge(model.to(device), tokenizer(folder), beams, source)


BEAM_DEFAULTS = {"beam_size": 5, "min_length": 1, "max_length": 10}


def build(config: Config, weights: Mapping[str, Tensor], where: Path | str) -> tuple[MPlug, int]:
    """Make the network of these weights; also how many of them it does not need (momentum, unused heads and layers)."""
    with torch.device("meta"):
        model = MPlug(config)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights]
    resized = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or resized:
        first = f"{(missing or resized)[0]} is {'missing' if missing else 'of another size'}"
        raise Flux2PixelError(f"{where}: {len(missing)} weights missing, {len(resized)} of another size ({first})")
    model.load_state_dict({name: weights[name].float() for name in wanted}, assign=True)
    return model.eval().requires_grad_(False), len(weights.keys() - wanted.keys())


def tokenizer(folder: Path) -> Any:
    """The uncased BERT tokenizer of ``vocab.txt``, proven to read it: some versions of the class ignore the file."""
    from transformers import BertTokenizer

    words = BertTokenizer.from_pretrained(folder, local_files_only=True, do_lower_case=True)
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = words("is the dog red?")["input_ids"]
    if words.unk_token_id in ids or [vocabulary[i] for i in ids] != ["[CLS]", "is", "the", "dog", "red", "?", "[SEP]"]:
        raise UsageError(f"{folder}/vocab.txt: does not tokenise plain English; want BERT's uncased vocabulary")
    return words


class MPlugJudge:
    """DPG-Bench's official judge: mPLUG in float32, beam search, each crop encoded once for all its questions."""

    name = "official"

    def __init__(self, model: MPlug, words: Any, beams: Mapping[str, int], source: Mapping[str, Any]):
        self.model, self._words, self._source = model, words, dict(source)
        self._beams = (beams["beam_size"], beams["min_length"], beams["max_length"])

    def pixels(self, image: Rgb) -> Tensor:
        """Squash an image (H, W, 3) to the network's square, bicubic, and normalise as CLIP does: (3, S, S)."""
        side = self.model.config.image_side
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy(
            ((small / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1).copy()
        )

    @torch.inference_mode()
    def ask(self, images: Sequence[Rgb], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Answer as the official pipeline does: questions in lower case, cut at 25 tokens."""
        device = next(self.model.parameters()).device
        with exact_float32():
            states = self.model.see(torch.stack([self.pixels(image) for image in images]).to(device))
            return [
                self.read(state[None], asked) if asked else [] for state, asked in zip(states, questions, strict=True)
            ]

    def read(self, state: Tensor, questions: Sequence[str]) -> list[str]:
        """Answer questions about one encoded crop (1, N, d)."""
        tokens = self._words(
            [question.lower() for question in questions],
            padding="longest",
            truncation=True,
            max_length=QUESTION_TOKENS,
            return_tensors="pt",
        ).to(state.device)
        memory = self.model.read(state, tokens["input_ids"], tokens["attention_mask"])
        return [
            self._words.decode(h.ids, skip_special_tokens=True).strip()
            for h in search(self.model, memory, *self._beams)
        ]

    def provenance(self) -> dict[str, Any]:
        """Say which weights and libraries decide."""
        import transformers

        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"name": self.name, "model": "mPLUG-large VQA", **versions, **self._source}


class VlmJudge:
    """A current vision-language model of transformers as judge: other figures than the official, under its own name.

    ``folder`` is a local model folder or a Hub id; the question is asked for yes or no, answered greedily.
    """

    def __init__(self, folder: str, device: str | torch.device = "cpu", batch: int = 16):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name = f"vlm {Path(folder).name}"
        self._folder, self._batch = folder, batch
        self._processor = AutoProcessor.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()

    @torch.inference_mode()
    def ask(self, images: Sequence[Rgb], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Answer each question by itself; here "Yes." counts as yes, since the rule is not the official one."""
        pairs = [(image, question) for image, asked in zip(images, questions, strict=True) for question in asked]
        answers: list[str] = []
        for first in range(0, len(pairs), self._batch):
            answers += self._generate(pairs[first : first + self._batch])
        rest = iter(answers)
        return [[next(rest) for _ in asked] for asked in questions]

    def _generate(self, pairs: Sequence[tuple[Rgb, str]]) -> list[str]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.fromarray(image)},
                        {"type": "text", "text": f"{question} Answer yes or no."},
                    ],
                }
            ]
            for image, question in pairs
        ]
        inputs = self._processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self._model.device)
        output = self._model.generate(**inputs, max_new_tokens=5, do_sample=False)
        texts = self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip().rstrip(".").lower() for text in texts]

    def provenance(self) -> dict[str, Any]:
        """Say which model decides, and that it is not the protocol's."""
        revision = getattr(self._model.config, "_commit_hash", None)
        return {"name": self.name, "model": self._folder, "revision": revision, "official": False}
