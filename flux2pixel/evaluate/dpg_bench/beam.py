"""mPLUG's beam search: the official judge's answers, in batches of questions about one crop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flux2pixel.evaluate.dpg_bench.mplug import Memory, MPlug

START, END = 101, 102
PENALTY = 0.6
FORBIDDEN = -1e20


@dataclass(frozen=True)
class Hypothesis:
    """An answer: its token ids with start, and end if reached, and its length-penalised log probability."""

    ids: tuple[int, ...]
    score: float


@torch.inference_mode()
def search(model: MPlug, memory: Memory, beams: int = 5, min_length: int = 1, max_length: int = 10) -> list[Hypothesis]:
    """Answer each question of ``memory``.

    The penalty ``((5 + step + 1) / 6) ** 0.6`` applies at every step. A question is done when its best beam ends or at
    ``max_length``; the best stored hypothesis wins. A beam that ends while not the best is stored and goes on.
    """
    device, count = memory.text.device, len(memory.text)
    decoding = model.start(memory, beams)
    sequences = torch.full((count, beams, 1), START, device=device)
    sums = torch.tensor([0.0] + [float("-inf")] * (beams - 1), device=device).repeat(count, 1)  # all start alike
    open_questions = list(range(count))
    best: dict[int, Hypothesis] = {}
    for step in range(max_length):
        logits = model.step(sequences[..., -1].flatten(), decoding)
        log_probs = logits.float().log_softmax(-1)
        if step < min_length:
            log_probs[:, END] = FORBIDDEN
        penalty = ((5.0 + step + 1) / 6.0) ** PENALTY
        vocabulary = log_probs.shape[-1]
        candidates = (log_probs.unflatten(0, (-1, beams)) + sums[..., None]).flatten(1) / penalty
        scores, picks = candidates.topk(beams, -1)  # (questions, beams)
        sums = scores * penalty
        parents, tokens = picks // vocabulary, picks % vocabulary
        sequences = torch.cat([sequences.gather(1, parents[..., None].expand(-1, -1, step + 1)), tokens[..., None]], -1)
        ended = (tokens == END).tolist()
        going = []
        for row, question in enumerate(open_questions):
            last = step + 1 == max_length or ended[row][0]
            for beam in range(beams):
                if ended[row][beam] or last:
                    _store(best, question, sequences[row, beam], scores[row, beam])
            if not last:
                going.append(row)
        if not going:
            break
        kept = torch.tensor(going, device=device)
        decoding.take((parents + torch.arange(len(parents), device=device)[:, None] * beams)[kept].flatten())
        sequences, sums = sequences[kept], sums[kept]
        open_questions = [open_questions[row] for row in going]
    return [best[question] for question in range(count)]


def _store(best: dict[int, Hypothesis], question: int, ids: Tensor, score: Tensor) -> None:
    if question not in best or score.item() > best[question].score:
        best[question] = Hypothesis(tuple(ids.tolist()), score.item())
