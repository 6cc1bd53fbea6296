"""Conditionings of prompts, each encoded once and reused over samples, steps, guidance, suites and models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from flux2pixel.families.base import Conditioning, stack

BUDGET = 8 << 30  # bytes held; GenEval's 553 prompts of a 9B model's encoder take 7 GB
AHEAD = 64  # prompts encoded together

Encode = Callable[[list[str]], Conditioning]


class Texts:
    """A store of conditionings on the CPU under (digest of the text encoder, prompt).

    ``expected`` are prompts that will be asked for, in that order: they are encoded in batches ahead of their use.
    The least recently used are let go beyond ``budget`` bytes. ``encoded`` counts prompts that went through an encoder.
    """

    def __init__(self, budget: int = BUDGET):
        self._budget, self._held = budget, 0
        self._store: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()
        self._expected: list[str] = []
        self.encoded = 0

    def expect(self, prompts: Sequence[str]) -> None:
        """Say which prompts come next."""
        self._expected = list(dict.fromkeys(prompts))

    def of(self, encoder: str, encode: Encode, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with the batch in the order of ``prompts``; ``encode`` is asked only for new ones."""
        new = [p for p in dict.fromkeys(prompts) if (encoder, p) not in self._store]
        if new:
            self._add(encoder, encode, new + self._following(encoder, new))
        for prompt in prompts:
            self._store.move_to_end((encoder, prompt))
        # Joined, not padded here: rows of one encoder come from one call's length or carry a mask.
        found = stack(*[self._store[encoder, prompt] for prompt in prompts])
        self._trim()
        return found

    def _following(self, encoder: str, new: Sequence[str]) -> list[str]:
        if new[0] not in self._expected:
            return []
        start = self._expected.index(new[0])
        ahead = self._expected[start : start + AHEAD]
        return [p for p in ahead if p not in new and (encoder, p) not in self._store]

    @torch.no_grad()
    def _add(self, encoder: str, encode: Encode, prompts: list[str]) -> None:
        for first in range(0, len(prompts), AHEAD):
            some = prompts[first : first + AHEAD]
            rows = encode(some)
            self.encoded += len(some)
            for index, prompt in enumerate(some):
                row = {name: value[index : index + 1].cpu().clone() for name, value in rows.items()}
                self._store[encoder, prompt] = row
                self._held += _bytes(row)

    def _trim(self) -> None:
        while self._held > self._budget and len(self._store) > 1:
            _, row = self._store.popitem(last=False)
            self._held -= _bytes(row)


def _bytes(row: Conditioning) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())
