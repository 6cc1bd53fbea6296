"""Text encoders as conditionings need them: no vocabulary logits, no layer after the last one read, nothing missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flux2pixel.families.base import Encoder, device_of
from flux2pixel.runtime.errors import UsageError, first_line

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "tekken.json")
PICTURES = ("visual", "vision_tower", "multi_modal_projector")  # of models that also read pictures: never called


class Reader(nn.Module):
    """A language model that stock pipelines call as theirs, and that keeps the hidden states they read, no others.

    Args:
        model: of transformers, without a head; its layers behind the deepest state may be absent.
        states: the numbers by which the pipeline asks for hidden states.
        depth: layers of the whole model, from which negative numbers count.
    """

    def __init__(self, model: Any, states: Sequence[int], depth: int):
        super().__init__()
        self.model, self.depth = model, depth
        self.states = {state: state if state >= 0 else depth + 1 + state for state in states}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, output_hidden_states: bool = True, **inputs: Any) -> Any:
        """The stock call; ``hidden_states`` of what it returns can be asked for :attr:`states`."""
        kept: dict[int, Tensor] = {}
        hooks = []
        for index in self.states.values():
            if index < self.depth:  # the state behind the last layer is the normed one, the model's result
                hooks.append(_decoder(self.model).layers[index - 1].register_forward_hook(_keep(kept, index)))
        try:
            result = self.model(**inputs | {"use_cache": False})
        finally:
            for hook in hooks:
                hook.remove()
        kept[self.depth] = result.last_hidden_state
        return SimpleNamespace(hidden_states={state: kept[index] for state, index in self.states.items()})


def _keep(kept: dict[int, Tensor], index: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        kept[index] = output[0] if isinstance(output, tuple) else output

    return hook


def _decoder(model: Any) -> Any:
    """The text decoder of a model that may read pictures too."""
    return getattr(model, "language_model", model)


def load_encoder(folder: Path, encoder: Encoder, dtype: torch.dtype) -> Any:
    """Load a text encoder, frozen, on the CPU. Raises UsageError naming the folder if tensors are missing."""

    def load(kind: Any, config: Any) -> Any:
        with _only_errors():  # unread layers are left out on purpose, and a table of them would be printed
            loaded, report = kind.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
        refuse_missing(folder, report["missing_keys"])
        return loaded

    return _reader(folder, encoder, load)


def empty_encoder(folder: Path, encoder: Encoder, dtype: torch.dtype, written: Mapping[str, Any]) -> Any:
    """The same encoder on the meta device, from its ``written`` configuration alone: for plans."""

    def build(kind: Any, config: Any) -> Any:
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                return kind(config)
        finally:
            torch.set_default_dtype(default)

    return _reader(folder, encoder, build, written)


def _reader(
    folder: Path, encoder: Encoder, make: Callable[[Any, Any], Any], written: Mapping[str, Any] | None = None
) -> Any:
    """What ``make`` gives for the class and the configuration, the folder's or ``written``, cut to the layers read."""
    import transformers

    kind = getattr(transformers, encoder.model)
    try:
        if written is None:
            config = transformers.AutoConfig.from_pretrained(folder)
        else:
            config = transformers.AutoConfig.for_model(**written)
        depth = config.get_text_config().num_hidden_layers
        if encoder.states:
            _shorten(config.get_text_config(), encoder.states, depth, folder)
        loaded = make(kind, config)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    for name in PICTURES:
        if hasattr(loaded, name):
            setattr(loaded, name, None)
    model = Reader(loaded, encoder.states, depth) if encoder.states else loaded
    return model.eval().requires_grad_(False)


@contextmanager
def _only_errors() -> Iterator[None]:
    """transformers logs no warnings while the block runs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _shorten(config: Any, states: Sequence[int], depth: int, folder: Path) -> None:
    """Cut a configuration to the layers that ``states`` need."""
    deepest = max(state if state >= 0 else depth + 1 + state for state in states)
    if deepest > depth:
        raise UsageError(f"{folder}/config.json: has {depth} layers, the base reads the {deepest}th; get it again")
    config.num_hidden_layers = deepest
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:deepest]


def load_tokenizer(folder: Path, kind: str) -> Any:
    """Load a tokenizer or processor. Raises UsageError naming the folder if it cannot be, or has no vocabulary."""
    import transformers

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UsageError(f"{folder}: holds no vocabulary ({', '.join(VOCABULARIES[:3])}, ...); get it again")
    try:
        return getattr(transformers, kind).from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: cannot be loaded ({first_line(error)})") from error


def refuse_missing(folder: Path, missing: Iterable[str]) -> None:
    """Raise UsageError if the weights of ``folder`` lack tensors: the libraries would fill them in at random."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(f"{folder}: its weights lack {names[0]}{more}; download or copy it again")
