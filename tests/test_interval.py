import numpy as np
import pytest

from flux2pixel.evaluate.statistics import difference, mean_interval, tag_mean_interval
from flux2pixel.evaluate.suite import Prompt, Record


def verdicts(prompts: int, seed: int, images: int = 4) -> list[list[bool]]:
    """Prompts of differing difficulty, 0.6 on average."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(3, 2, size=prompts)
    return [[bool(x) for x in rng.random(images) < p] for p in chance]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    intervals = [mean_interval(verdicts(80, seed), resamples=500) for seed in range(200)]
    assert 0.9 <= np.mean([low <= 0.6 <= high for _, low, high in intervals]) <= 0.99


def test_more_prompts_shrink_it_and_more_of_the_same_images_do_not() -> None:
    few, many = verdicts(40, 0), verdicts(640, 0)
    _, low, high = mean_interval(few)
    _, many_low, many_high = mean_interval(many)
    assert (many_high - many_low) < 0.4 * (high - low)
    assert mean_interval([values * 5 for values in few])[1:] == pytest.approx((low, high))


def test_the_mean_lies_inside_and_a_sure_thing_has_no_width() -> None:
    mean, low, high = mean_interval(verdicts(30, 1))
    assert low < mean < high
    assert mean_interval([[True] * 4] * 9) == (1.0, 1.0, 1.0)
    assert mean_interval(verdicts(30, 1)) == (mean, low, high)


def test_pairing_is_tighter_than_two_intervals_and_signed() -> None:
    b = verdicts(100, 3)
    a = [[True, *values[1:]] for values in b]
    prompts = [Prompt(str(i), "", "", 4) for i in range(100)]

    def records(verdicts: list[list[bool]]) -> list[Record]:
        return [Record(str(i), j, "", float(v)) for i, row in enumerate(verdicts) for j, v in enumerate(row)]

    gap = difference(prompts, records(a), records(b))
    assert gap is not None and 0 < gap["low"] < gap["difference"] < gap["high"] and gap["prompts"] == 100
    _, one_low, one_high = mean_interval(a)
    assert gap["high"] - gap["low"] < one_high - one_low
    assert difference(prompts, records(b), records(a))["difference"] == pytest.approx(-gap["difference"])
    assert difference(prompts, records(b), records(b)) == {"difference": 0.0, "low": 0.0, "high": 0.0, "prompts": 100}
    assert difference(prompts, records(a), records(b)[:20], percent=True)["prompts"] == 5
    assert difference(prompts, records(a), []) is None


@pytest.mark.parametrize("bad", [[], [[True], []]])
def test_nothing_to_average_is_an_error(bad: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(bad)


def test_overall_is_the_mean_of_the_tags_whatever_their_sizes() -> None:
    scores = {"a": [1.0] * 3, "b": [0.0, 0.5] * 40}
    mean, low, high = tag_mean_interval(scores)
    assert mean == pytest.approx((1.0 + 0.25) / 2)
    assert low < mean < high
    # Only b varies, and half of its spread reaches the overall.
    _, b_low, b_high = tag_mean_interval({"b": scores["b"]})
    assert high - low == pytest.approx((b_high - b_low) / 2, rel=0.15)
