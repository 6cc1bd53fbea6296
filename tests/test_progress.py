"""Progress: what a bar says on a terminal and in the log of a batch job, and errors on one line."""

import sys

import pytest
import torch

from flux2pixel.runtime import errors, progress


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is told."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_in_a_log_there_is_a_line_at_the_start_and_then_a_line_a_minute(clock, capsys):
    with progress.bar("fit-subspace", 4000, unit="images") as bar:
        for _ in range(300):  # 5 minutes
            clock[0] += 1
            bar.advance(8, note="fine")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fit-subspace: 4000 images"
    assert lines[1] == "fit-subspace: 480/4000 images, 8.00 images/s, 0:07:20 left, fine"
    assert len(lines) == 6 and lines[5].startswith("fit-subspace: 2400/4000 images, 8.00 images/s, 0:03:20 left")


def test_bytes_are_gigabytes_and_a_slow_rate_is_seconds_each(clock, capsys):
    with progress.bar("convert", 18_000_000_000, unit="bytes") as bar:
        clock[0] += 60
        bar.advance(6_000_000_000)
    with progress.bar("finetune", 100, unit="steps") as bar:
        bar.skip(50)  # of an earlier run: in no rate
        clock[0] += 66
        bar.advance(2)
    with progress.bar("cache", None, unit="images") as bar:
        clock[0] += 60
        bar.advance(120)
    with progress.bar("quiet", 3, shown=False) as bar:
        clock[0] += 99
        bar.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "convert: 18.00 GB",
        "convert: 6.00/18.00 GB, 0.10 GB/s, 0:02:00 left",
        "finetune: 100 steps",
        "finetune: 52/100 steps, 33.0 s each, 0:26:24 left",
        "cache: an unknown number of images",
        "cache: 120 images, 2.00 images/s",
    ]


def test_a_terminal_shows_the_same_beside_the_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "console", progress.Console(stderr=True, force_terminal=True, width=160))
    with progress.bar("eval", 40, unit="images") as bar:
        clock[0] += 10
        bar.advance(20, note="loss 0.1")
    said = capsys.readouterr().err
    assert "20/40 images, 2.00 images/s, 0:00:10 left, 0:00:10 so far" in said and "loss 0.1" in said


def test_no_error_has_an_empty_line():
    assert errors.one_line(ValueError()) == errors.first_line(ValueError("\n")) == "ValueError"
    assert errors.first_line(ValueError("\nfirst\nsecond")) == "first"
    assert errors.sentence(ImportError("No module named 'lpips'")) == "No module named 'lpips'"
    assert errors.sentence(MemoryError()) == "out of memory; take a smaller batch, resolution or dtype"
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB. GPU 0 has a total of 80 GiB. More.")
    assert "CUDA out of memory. Tried to allocate 34 GiB); take a smaller" in errors.sentence(gpu)
    assert errors.sentence(KeyError("name")) == "KeyError: 'name' (--debug shows where)"
