"""The memory of a training step without its weights: the step itself is run on fake tensors, and storages are counted.

A fake tensor has a shape, a dtype and a device but no data, so that 9 billion parameters cost nothing; the operations,
autocast, checkpointing and autograd are the real ones, and what they keep alive is what a real step keeps alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.data.cache import Batch, Size
from flux2pixel.data.encode import MAX_TEXT
from flux2pixel.finetune.network import trainable
from flux2pixel.finetune.network.quantise import quantise
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference, Velocity
from flux2pixel.models.base import Base
from flux2pixel.models.plan import conditioning_like, construct
from flux2pixel.recipe import Finetune
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.meter import Meter, faked


@dataclass(frozen=True)
class Network:
    """A pixel network prepared for training, and the frozen latent one if it is apart (full finetuning with variance
    reduction), both on the meta device. ``config`` is the latent transformer's; ``total`` counts the parameters of the
    stock class, ``frozen`` those that are not trained."""

    base: Base
    config: dict[str, Any]
    settings: Finetune
    network: Any
    groups: list[trainable.Group]
    reference: Any
    total: int
    frozen: int


def build(base: Base, config: dict[str, Any], settings: Finetune) -> Network:
    """The networks that a training would hold. Raises UsageError for LoRA patterns that match nothing."""
    low = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    lora = settings.trainable == "lora"
    network = construct(base, base.pixel_config(config), low if lora else torch.float32)
    total = sum(p.numel() for p in network.parameters())
    with torch.device("meta"):
        groups = trainable.prepare(network, base, settings, 0)
        frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
        if settings.frozen_int8:
            quantise(network)
    reference = None
    if not lora and settings.loss != "flow-matching":
        reference = construct(base, config, low).requires_grad_(False)
    return Network(base, config, settings, network.train(), groups, reference, total, frozen)


class Step:
    """Forward and backward of a built network, on fake tensors. Takes the network over: it is no longer on ``meta``.

    ``gathered``: the weights are as a sharded bf16 training gathers them, so that no cast of them is kept.
    """

    def __init__(self, built: Network, *, gathered: bool = False):
        self.built, self.mode = built, FakeTensorMode(allow_non_fake_inputs=True)
        low = torch.bfloat16 if gathered and built.settings.precision == "bf16" else None
        self.network = faked(built.network, self.mode, low)
        self.reference = None if built.reference is None else faked(built.reference, self.mode)
        self.lpips = faked(_lpips(), self.mode) if built.settings.perceptual else None

    def peak(
        self, size: Size, count: int, *, checkpointing: bool, gradient_share: float = 1.0, text_tokens: int = MAX_TEXT
    ) -> int:
        """Most bytes at one time over ``count`` images of ``size`` (height, width) pixels, weights not counted.

        Activations, casts of weights, temporaries, the batch itself, and ``gradient_share`` of the gradients made so
        far.
        """
        built, patch = self.built, self.built.base.patch_size
        tokens = (size[0] // patch) * (size[1] // patch)
        flow = AsymFlow(torch.eye(built.base.token_width, built.base.latent_width), 1.0)
        with self.mode, _checkpointing(self.network, checkpointing):
            batch = batch_like(built.base, built.config, size, count, text_tokens)
            sigma, eps = torch.rand(count), torch.randn(count, tokens, built.base.token_width)
            meter = Meter(gradient_share)
            for network in filter(None, (self.network, self.reference, self.lpips)):
                meter.ignore(network.parameters())
                meter.ignore(network.buffers())
            trained = [p for p in self.network.parameters() if p.requires_grad]
            hooks = [p.register_post_accumulate_grad_hook(lambda p: meter.exempt(p.grad)) for p in trained]
            try:
                with meter:
                    self._objective(flow)(self.network, batch, sigma, eps).loss.backward()
            finally:
                for hook in hooks:
                    hook.remove()
                self.network.zero_grad()
        inputs = [batch.rgb, batch.latents, eps, *batch.conditioning.values()]
        return meter.peak + sum(t.nbytes for t in inputs)

    def _objective(self, flow: AsymFlow) -> Objective:
        built = self.built
        reference: Velocity | None = None
        if self.reference is not None:
            reference = LatentReference(built.base, self.reference)
        elif built.settings.loss != "flow-matching":
            reference = SharedReference(built.base, self.network, flow.basis)
        return Objective(built.settings, built.base, flow, reference, self.lpips)


def _lpips() -> Any:
    """LPIPS without weights. Raises UsageError if the package is absent."""
    try:
        import lpips
    except ImportError as error:
        raise UsageError("finetune.perceptual: needs the package lpips; pip install 'flux2pixel[train]'") from error
    with torch.device("meta"):
        network = lpips.LPIPS(net="vgg", spatial=True, pretrained=False, pnet_rand=True, verbose=False)
    return network.eval().requires_grad_(False)


def batch_like(base: Base, config: dict[str, Any], size: Size, count: int, text_tokens: int) -> Batch:
    """A batch of ``count`` images of ``size``, of the shapes and dtypes that the cache gives."""
    height, width = size
    tokens = (height // base.patch_size) * (width // base.patch_size)
    conditioning = conditioning_like(base, config, count, text_tokens)
    return Batch(
        torch.empty(count, 3, height, width, dtype=torch.uint8),
        torch.empty(count, tokens, base.latent_width, dtype=torch.float16),
        conditioning,
        [],
        base.patch_size,
    )


@contextmanager
def _checkpointing(network: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()
