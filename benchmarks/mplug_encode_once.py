"""DPG-Bench's judge: a crop encoded once for all its questions, against the official way, one question at a time.

Both sides are the same network and beam search and give the same answers (checked here). Random weights: an untrained
judge rarely ends an answer early, so each runs to the ten-token limit. The model is small: the official vision tower is
far heavier against its decoder (24 layers over 1297 tokens), so that its gain should be the greater.

    python benchmarks/mplug_encode_once.py
"""

import statistics
import time

import torch

from flux2pixel.evaluate.dpg_bench.beam import search
from flux2pixel.evaluate.dpg_bench.mplug import Config, MPlug

QUESTIONS, TOKENS, REPEATS = 14, 12, 5  # DPG-Bench has 13.5 questions an item
SMALL = {"width": 96, "heads": 4, "ffn": 192, "image_side": 112, "vision_width": 128, "vision_layers": 4}
DEPTHS = {"text_layers": 2, "fusion_layers": 2, "hidden_layers": 4, "decoder_layers": 3, "stride": 6}
WORDS = {"vocabulary": 1000, "positions": 64, "token_types": 2, "eps": 1e-12, "vision_patch": 14}


def once(model, pixels, ids, mask):
    return search(model, model.read(model.see(pixels), ids, mask))


def one_at_a_time(model, pixels, ids, mask):
    return [once(model, pixels, i[None], m[None])[0] for i, m in zip(ids, mask, strict=True)]


@torch.inference_mode()
def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MPlug(Config(**SMALL, **DEPTHS, **WORDS)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3 / parameter.shape[-1] ** 0.5)
    side = model.config.image_side
    pixels = torch.randn(1, 3, side, side)
    ids = torch.randint(110, 1000, (QUESTIONS, TOKENS))
    mask = torch.ones_like(ids)
    pairs = []
    for _ in range(REPEATS):
        begun = time.process_time()
        alone = one_at_a_time(model, pixels, ids, mask)
        between = time.process_time()
        together = once(model, pixels, ids, mask)
        pairs.append((between - begun, time.process_time() - between))
    assert [a.ids for a in alone] == [a.ids for a in together]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{QUESTIONS} questions of one crop, medians of processor time over {REPEATS} interleaved runs, same answers")
    print(f"one question at a time {slow:.2f} s, crop encoded once {fast:.2f} s: {ratio:.1f} times faster")


if __name__ == "__main__":
    main()
