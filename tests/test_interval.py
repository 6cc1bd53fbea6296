import numpy as np
import pytest

from flux2pixel.evaluate.statistics import mean_interval, paired_difference, tag_mean_interval


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
    difference, low, high = paired_difference(a, b)
    assert 0 < low < difference < high
    _, one_low, one_high = mean_interval(a)
    assert high - low < one_high - one_low
    assert paired_difference(b, a)[0] == pytest.approx(-difference)
    assert paired_difference(b, b) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [[], [[True], []]])
def test_nothing_to_average_is_an_error(bad: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(bad)
    with pytest.raises(ValueError, match="must be the same"):
        paired_difference([[True]], [[True], [False]])


def test_overall_is_the_mean_of_the_tags_whatever_their_sizes() -> None:
    scores = {"a": [1.0] * 3, "b": [0.0, 0.5] * 40}
    mean, low, high = tag_mean_interval(scores)
    assert mean == pytest.approx((1.0 + 0.25) / 2)
    assert low < mean < high
    # Only b varies, and half of its spread reaches the overall.
    _, b_low, b_high = tag_mean_interval({"b": scores["b"]})
    assert high - low == pytest.approx((b_high - b_low) / 2, rel=0.15)
