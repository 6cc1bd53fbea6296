"""What is trained: everything, or projections and final modulation in full with LoRA on the family's list of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flux2pixel.models.base import Base
from flux2pixel.recipe import Finetune
from flux2pixel.runtime.errors import UsageError

ADAPTER = "default"  # peft's own name for an adapter without one


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate: its name, their names, the rate at its peak."""

    name: str
    parameters: tuple[str, ...]
    lr: float


def projections(base: Base) -> dict[str, tuple[str, ...]]:
    """Modules of the pixel network that are trained in full, by group."""
    names = base.projections
    return {
        "in_projection": tuple(base.pixel_name(name) for name in names.inputs),
        "out_projection": (base.pixel_name(names.output),),
        "modulation": (base.pixel_name(names.modulation),),
    }


def lora_modules(network: nn.Module, base: Base, targets: Sequence[str]) -> list[str]:
    """Full names of the Linear layers that the patterns match; the pattern ``base`` is the family's own list.

    Raises UsageError for a pattern that is no regular expression or matches no Linear layer.
    """
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    patterns = [p for target in targets for p in (base.lora_targets if target == "base" else (target,))]
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            matched = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UsageError(f"finetune.lora_targets: {pattern!r} is not a regular expression ({error})") from error
        if not matched:
            raise UsageError(
                f"finetune.lora_targets: {pattern!r} matches no Linear layer of {type(network).__name__}, "
                f"whose first are {', '.join(linears[:3])}; full names are matched"
            )
        found.update(dict.fromkeys(matched))
    full = {name for group in projections(base).values() for name in group}
    return [name for name in found if name not in full]


def prepare(network: Any, base: Base, settings: Finetune, seed: int) -> list[Group]:
    """Mark and, for LoRA, add what is trained, in float32; returns the groups. The network is changed in place."""
    if settings.trainable == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = lora_modules(network, base, settings.lora_targets)
        full = [name for names in projections(base).values() for name in names]
        network.requires_grad_(False)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            modules_to_save=full,
        )
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU: no other GPU is to be touched
            torch.manual_seed(seed)  # LoRA's A is drawn: the same in every process and in every start
            inject_adapter_in_model(config, network)
    else:
        network.requires_grad_(True)
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return groups(network, base, settings)


def groups(network: nn.Module, base: Base, settings: Finetune) -> list[Group]:
    """The trained parameters by learning rate; groups without any are left out."""
    rates = {
        "in_projection": settings.lr * settings.in_projection_factor,
        "out_projection": settings.out_projection_lr,
        "modulation": settings.lr * settings.modulation_factor,
    }
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    found, left = [], dict.fromkeys(trained)
    for group, modules in projections(base).items():
        names = tuple(n for n in trained if any(n.startswith(f"{module}.") for module in modules))
        found.append(Group(group, names, rates[group]))
        for name in names:
            del left[name]
    found.append(Group("lora" if settings.trainable == "lora" else "rest", tuple(left), settings.lr))
    return [group for group in found if group.parameters]


def optimizer_class(settings: Finetune) -> Any:
    """AdamW, or torchao's with moments of 8 bits, which knows sharded parameters. UsageError if that is not there."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            f"finetune.optimizer = adamw-8bit needs torchao ({error}); pip install 'flux2pixel[train]', or set adamw"
        ) from error
    return AdamW8bit


def make_optimizer(network: nn.Module, groups: Sequence[Group], settings: Finetune) -> Optimizer:
    """The recipe's optimizer, betas (0.9, 0.95), no weight decay. Raises UsageError if its package is absent."""
    parameters = dict(network.named_parameters())
    table = [{"params": [parameters[n] for n in group.parameters], "lr": group.lr} for group in groups]
    made: Optimizer = optimizer_class(settings)(table, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return made


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of an optimizer's group; torchao keeps it in a tensor that its compiled step reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained tensors by name as (full weights, LoRA weights), both under the stock class's and peft's plain names."""
    full: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}.weight", ".weight")
        (lora if ".lora_A." in plain or ".lora_B." in plain else full)[plain] = tensor
    return full, lora


@torch.no_grad()
def merged(
    state: Mapping[str, Tensor], full: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The stock class's state dict with the trained weights in: W + scale B A in float32, stored in W's dtype."""
    result = dict(state)
    for name, tensor in full.items():
        result[name] = tensor.to(state[name].dtype)
    for name, down in lora.items():
        if ".lora_A." in name:
            up, target = lora[name.replace(".lora_A.", ".lora_B.")], name.replace(".lora_A.", ".")
            delta = scale * (up.float() @ down.float())
            result[target] = (state[target].float() + delta).to(state[target].dtype)
    return result
