from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from diffpref.evaluators import stats


def test_images_of_a_prompt_are_averaged_before_anything_else() -> None:
    ids, means = stats.average_by_prompt([1.0, 3.0, 10.0, 5.0], [7, 7, 2, 2])
    assert ids.tolist() == [2, 7]
    assert means.tolist() == [7.5, 2.0]
    _, columns = stats.average_by_prompt([[1.0, 0.0], [3.0, 1.0]], [4, 4])
    assert columns.tolist() == [[2.0, 0.5]]


def test_outcomes_count_a_difference_of_epsilon_as_a_tie() -> None:
    outcomes = stats.count_outcomes([0.5, 0.1, -0.1, 0.0, -0.3], epsilon=0.1)
    assert (outcomes.wins, outcomes.ties, outcomes.losses) == (1, 3, 1)
    assert outcomes.win_rate == (1 + 3 / 2) / 5
    assert stats.outcome_scores([0.5, 0.1, -0.1, 0.0, -0.3], 0.1).tolist() == [1, 0.5, 0.5, 0.5, 0]


@pytest.mark.parametrize(("wins", "total"), [(0, 10), (10, 10), (61, 100), (1, 1), (330, 600)])
def test_wilson_interval_equals_scipy(wins: int, total: int) -> None:
    expected = scipy_stats.binomtest(wins, total).proportion_ci(0.95, method="wilson")
    assert stats.wilson_interval(wins / total, total) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def expanded_by_hand(prompts: int) -> float:
    t = scipy_stats.t(prompts - 1).interval(0.95)[1]
    return float(scipy_stats.norm.sf(t * (prompts / (prompts - 1)) ** 0.5))


def test_the_expansion_cuts_off_less_of_few_prompts_and_nothing_less_of_many() -> None:
    assert stats.expanded_tail(30) == pytest.approx(0.01875, abs=1e-5)  # Phi(-2.04523 * 1.01710)
    assert stats.expanded_tail(2) < 1e-9
    assert stats.expanded_tail(1) == pytest.approx(0.025)
    assert stats.expanded_tail(10**7) == pytest.approx(0.025, abs=1e-7)


def test_bootstrap_equals_scipy_up_to_resampling_noise() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=(80, 2))
    ours = stats.bootstrap_means(values, resamples=40_000)
    for column in range(2):
        theirs = scipy_stats.bootstrap(
            (values[:, column],),
            np.mean,
            n_resamples=40_000,
            method="percentile",
            confidence_level=1 - 2 * expanded_by_hand(80),
            rng=np.random.default_rng(8),
        ).confidence_interval
        assert ours[column] == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_bootstrap_of_constant_scores_has_no_width_and_its_seed_fixes_it() -> None:
    assert stats.bootstrap_means([0.25] * 9).tolist() == [0.25, 0.25]
    values = np.random.default_rng(0).normal(size=50)
    first = stats.bootstrap_means(values, seed=5)
    assert first.tolist() == stats.bootstrap_means(values, seed=5).tolist()
    assert first.tolist() != stats.bootstrap_means(values, seed=6).tolist()
    # a column's interval does not depend on the columns beside it
    assert stats.bootstrap_means(np.stack([values, values**2], 1), seed=5)[0] == pytest.approx(
        first, abs=1e-12
    )


@pytest.mark.parametrize("prompts", [30, 50, 100])
@pytest.mark.parametrize("law", ["paired differences", "normal", "skewed", "win rate"])
def test_bootstrap_interval_covers_the_true_mean_19_times_in_20(law: str, prompts: int) -> None:
    """1500 studies at once, a column each; the share that holds the true mean has a deviation of 0.6 %."""
    generator, shape = np.random.default_rng(20), (prompts, 1500)
    truth = {"paired differences": 0.03, "normal": 5.0, "skewed": 2.0, "win rate": 0.6}[law]
    if law == "paired differences":
        studies = generator.beta(2, 3, size=shape) - generator.beta(2, 3, size=shape) + truth
    elif law == "normal":
        studies = generator.normal(truth, 3, size=shape)
    elif law == "skewed":
        studies = generator.gamma(2.0, size=shape)  # skewness 1.4
    else:
        studies = generator.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=shape)
    low, high = stats.bootstrap_means(studies, resamples=1000).T
    assert 0.93 <= np.mean((low <= truth) & (high >= truth)) <= 0.97


def test_bootstrap_of_a_ratio_resamples_prompts_with_all_their_pairs() -> None:
    generator = np.random.default_rng(9)
    counts = generator.integers(1, 9, 60)
    totals = generator.binomial(counts, 0.7)
    ours = stats.bootstrap_ratios(totals, counts, resamples=40_000)
    theirs = scipy_stats.bootstrap(
        (totals, counts),
        lambda a, b, axis: np.sum(a, axis=axis) / np.sum(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        method="percentile",
        confidence_level=1 - 2 * expanded_by_hand(60),
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.002)
    equal = stats.bootstrap_ratios(totals * 4.0, np.full(60, 4.0))
    assert equal == pytest.approx(stats.bootstrap_means(totals), abs=1e-12)


def test_weights_make_every_kind_count_the_same() -> None:
    # kinds' means 1/2 and 1: 3/4, where the plain mean is 2/3; weights 3/(2*2) and 3/(2*1)
    weights = stats.kind_weights(["b", "b", "a"])
    assert weights == pytest.approx([0.75, 0.75, 1.5])
    assert np.mean(weights * [0.0, 1.0, 1.0]) == pytest.approx(0.75)


def test_bootstrap_over_kinds_equals_scipys_of_the_mean_of_means() -> None:
    generator = np.random.default_rng(3)
    kinds = np.repeat([0, 1, 2], [16, 17, 30])
    values = generator.normal(np.array([0.0, 5.0, 9.0])[kinds], 1.0)

    def mean_of_means(values: np.ndarray, kinds: np.ndarray, axis: int) -> np.ndarray:
        means = [(values * (kinds == k)).sum(axis=axis) / (kinds == k).sum(axis=axis) for k in range(3)]
        return np.mean(means, axis=0)

    theirs = scipy_stats.bootstrap(
        (values, kinds), mean_of_means, paired=True, vectorized=True, n_resamples=20_000,
        method="percentile", confidence_level=1 - 2 * expanded_by_hand(61), rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = stats.bootstrap_over_kinds(values, kinds, resamples=20_000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)
    one_kind = stats.bootstrap_over_kinds(values, ["all"] * 63, resamples=500)
    assert one_kind == pytest.approx(stats.bootstrap_means(values, resamples=500), abs=1e-12)
    beside = stats.bootstrap_over_kinds(np.stack([values**2, values], 1), kinds, resamples=20_000)
    assert beside[1] == pytest.approx(ours, abs=1e-12)


def test_the_interval_over_kinds_covers_the_mean_of_means_19_times_in_20() -> None:
    generator, kinds = np.random.default_rng(8), np.repeat(range(6), [10, 12, 10, 15, 20, 20])
    shares = np.linspace(0.1, 0.9, 6)
    studies = generator.binomial(4, shares[kinds][:, None], size=(len(kinds), 1500)) / 4
    low, high = stats.bootstrap_over_kinds(studies, kinds, resamples=1000).T
    assert 0.93 <= np.mean((low <= shares.mean()) & (high >= shares.mean())) <= 0.97


def test_prompts_for_a_half_width_by_hand() -> None:
    # 1.959964^2 * 0.25 / 0.0438^2 = 500.6: the 4.4 points of 500 prompts, the 1.7 of 3200
    assert stats.prompts_for_win_rate(0.0438) == 501
    assert stats.prompts_for_win_rate(0.01732) == 3202
    # a fifth of ties leaves 0.25 - 0.05
    assert stats.prompts_for_win_rate(0.05, ties=0.2) == 308
    assert stats.prompts_for_mean(0.1, deviation=1.0) == 385
    assert stats.prompts_for_mean(0.1, deviation=0.0) == 1
    for bad in ({"half_width": 0.0}, {"half_width": 0.1, "win_rate": 0.05, "ties": 0.2}):
        with pytest.raises(ValueError):
            stats.prompts_for_win_rate(**bad)
    with pytest.raises(ValueError):
        stats.prompts_for_mean(0.1, deviation=-1.0)


def test_prompts_are_counted_for_all_outcomes_without_losses_or_without_wins() -> None:
    z = scipy_stats.norm.ppf(0.975)
    for total in range(1, 40):
        for ties in range(total + 1):
            for wins in (0, total - ties):
                seen = stats.Outcomes(wins, ties, total - ties - wins)
                variance = (seen.wins + ties / 4) / total - seen.win_rate**2
                needed = stats.prompts_for_win_rate(0.02, seen.win_rate, ties / total)
                assert needed == pytest.approx(max(1, (z / 0.02) ** 2 * variance), abs=1)


def test_so_many_prompts_give_that_half_width() -> None:
    generator = np.random.default_rng(6)
    outcomes = generator.choice([0.0, 0.5, 1.0], p=[0.35, 0.2, 0.45], size=(308, 40))
    low, high = stats.bootstrap_means(outcomes, resamples=2000).T
    assert np.mean(high - low) / 2 == pytest.approx(0.05, rel=0.03)
    values = generator.normal(0, 2.0, size=(stats.prompts_for_mean(0.25, 2.0), 40))
    low, high = stats.bootstrap_means(values, resamples=2000).T
    assert np.mean(high - low) / 2 == pytest.approx(0.25, rel=0.03)


def test_bootstrap_chunks_do_not_change_the_number_of_resamples() -> None:
    assert sum(stats._chunks(10_000, 3200)) == 10_000
    assert max(stats._chunks(10_000, 3200)) * 3200 <= stats._CHUNK


def test_sign_flip_p_of_three_prompts_by_hand() -> None:
    # |+-1 +-2 +-3| reaches 6 in 2 of 8 patterns, and reaches |1 + 2 - 3| = 0 in all of them
    assert stats.sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.sign_flip_p([1.0, 2.0, -3.0]) == pytest.approx(1.0)
    # 0.1 + 0.2 is not 0.3 in floating point; the two patterns of equal size must still both count
    assert stats.sign_flip_p([0.1, 0.2, 0.3]) == pytest.approx(2 / 8)


def test_sign_flip_p_equals_scipys_permutation_test() -> None:
    generator = np.random.default_rng(4)
    base = generator.normal(size=40)
    candidate = base + generator.normal(0.25, 1.0, size=40)
    theirs = scipy_stats.permutation_test(
        (candidate, base),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).pvalue
    assert stats.sign_flip_p(candidate - base, resamples=20_000) == pytest.approx(theirs, abs=0.012)


def test_sign_flip_p_is_one_without_differences_and_never_zero() -> None:
    assert stats.sign_flip_p(np.zeros(50)) == 1.0
    assert stats.sign_flip_p(np.ones(50), resamples=999) == pytest.approx(1 / 1000)


def test_sign_flip_p_is_uniform_when_nothing_differs() -> None:
    noise = np.random.default_rng(2).normal(size=(30, 1000))
    assert 0.03 <= np.mean(stats.sign_flip_p(noise, resamples=2000) < 0.05) <= 0.07


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.5 -> 4*0.01, 3*0.02, max(0.06, 2*0.03), 0.5
    assert stats.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert stats.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_statistics_of_nothing_or_of_nan_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError):
        stats.bootstrap_means(values)
    with pytest.raises(ValueError):
        stats.sign_flip_p(values)
