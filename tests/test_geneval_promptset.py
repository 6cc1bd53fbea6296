"""GenEval's prompts: the official bytes from our own generator, and what a file of one's own must hold."""

import json
from collections import Counter

import pytest

from flux2pixel.evaluate.geneval import promptset
from flux2pixel.runtime.errors import UsageError


def test_the_generator_makes_the_official_bytes():
    rows = promptset.metadata()
    assert promptset.digest(rows) == promptset.SHA256
    assert len(promptset.jsonl(rows)) == 85209
    counts = Counter(row["tag"] for row in rows)
    assert counts == dict(zip(promptset.TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    suite = promptset.prompts(rows)
    assert (suite[0].id, suite[-1].id, suite[0].samples) == ("00000", "00552", 4)


def test_a_file_of_ones_own_is_read_and_checked(tmp_path):
    path = tmp_path / "metadata.jsonl"
    rows = promptset.metadata()[:5]
    path.write_bytes(promptset.jsonl(rows))
    assert promptset.read(path) == rows
    good = json.dumps(rows[0])
    for text, message in (
        ("", "holds no prompt"),
        (good + "\n{", ":2: not JSON"),
        (f"{good}\n{good}\n", ":2: the same as line 1"),
        ('{"prompt": "x"}\n', "want an object with tag, include and prompt"),
        ('{"tag": "t", "prompt": "x", "include": [{"class": "dog"}]}', "needs class and count"),
        ('{"tag": "t", "prompt": "x", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}', "'mauve' is none"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            promptset.read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        promptset.read(tmp_path / "absent.jsonl")
