"""Which published figures a score may stand beside: judge, prompts, size and sampler must all be the published ones."""

from typing import Any

import pytest

from flux2pixel.evaluate.report.comparable import comparable

PROTOCOL: dict[str, Any] = {
    "judge": "official", "prompts_official": True, "prompts_rewritten": False, "sizes": {"1024x1024": 553}
}  # fmt: skip
SAMPLER = {"steps": 32, "guidance": 4.0, "shift": 17.0, "solver": "unipc"}


def one(protocol: dict[str, Any] | None = None, sampler: dict[str, Any] | None = None, suite: str = "geneval") -> Any:
    """What a report says of one model's suite."""
    row = {"protocol": PROTOCOL | (protocol or {}), "missing": []}
    generation = {"sample": SAMPLER | (sampler or {})}
    return comparable({"m": {suite.replace("-", "_"): row, "generation": generation}})[suite]


def test_what_is_comparable() -> None:
    assert one()["comparable"] and one()["published"]
    for change, said in [
        ({"judge": "miniature"}, "not by the official scorer"),
        ({"prompts_official": False}, "other prompts"),
        ({"prompts_rewritten": True}, "raises scores"),
        ({"prompts_rewritten": "unknown"}, "made elsewhere"),
    ]:
        found = one(change)
        assert not found["comparable"] and not found["published"] and said in found["reasons"][0]
    partial = {"geneval": {"protocol": PROTOCOL, "missing": [["00000", 1]]}, "generation": {"sample": SAMPLER}}
    assert comparable({"m": partial})["geneval"]["reasons"] == ["m: partial, 1 images are missing"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 4}, "steps 4"),
        ({"guidance": 3.0}, "guidance 3"),
        ({"shift": 1.0}, "shift 1"),
        ({"shift": None}, "shift"),
    ],
)
def test_another_sampler_is_named_and_not_comparable(change: dict[str, Any], said: str) -> None:
    found = one(sampler=change)
    assert not found["comparable"] and said in found["reasons"][0] and "published at" in found["reasons"][0]
    assert found["statement"].startswith("Not comparable")


@pytest.mark.parametrize("suite", ["geneval", "dpg-bench", "hpsv3"])
def test_a_figure_of_1024_pixels_is_not_listed_against_another_size(suite: str) -> None:
    listed = [row["model"] for row in one(suite=suite)["published"]]
    assert "AsymFLUX.2 klein 9B" in listed
    for sizes in ({"512x512": 553}, {"1024x1024": 100, "768x1344": 453}):
        found = one({"sizes": sizes}, suite=suite)
        assert not found["comparable"] and found["reasons"]
        assert not any("1024x1024" in row["protocol"] for row in found["published"])
    assert "1024x1024, steps 32, guidance 4, shift 17" in [row["protocol"] for row in one(suite=suite)["published"]]


def test_images_made_elsewhere_have_unknown_settings() -> None:
    row = {"geneval": {"protocol": PROTOCOL, "missing": []}}
    found = comparable({"m": row})["geneval"]
    assert not found["comparable"] and "steps unknown" in found["reasons"][0]
