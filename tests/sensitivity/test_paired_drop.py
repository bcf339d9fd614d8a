import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import fminbound, root_scalar
from scipy.special import xlogy
from scipy.stats import multivariate_hypergeom, norm

from distiller.errors import UsageError
from distiller.sensitivity.paired_drop import LOOK_ALPHA, StopRule, drop_interval, is_known, looks


@st.composite
def samples(draw, largest=20_000):
    """(n, total, lost, won)"""
    total = draw(st.integers(1, largest))
    n = draw(st.integers(1, total))
    lost = draw(st.integers(0, n))
    return n, total, lost, draw(st.integers(0, n - lost))


def likeliest_variance(lost, won, neither, drop):
    """Of one image's difference with mean `drop`, the likelihood maximised by search."""

    def unlikelihood(won_rate):
        rates = np.array([won_rate + drop, won_rate, 1 - 2 * won_rate - drop])
        return -xlogy([lost, won, neither], np.maximum(rates, 1e-300)).sum()

    won_rate = fminbound(unlikelihood, max(0.0, -drop), (1 - drop) / 2, xtol=1e-13)
    return 2 * won_rate + drop - drop**2


def reference_interval(n, total, lost, won, alpha, added=0.25, step=None):
    """Tango's interval by root finding on each side of the estimate, in points."""
    z, estimate = norm.isf(alpha / 2), (lost - won) / n
    step = 1 / total if step is None else step

    def excess(drop):
        variance = likeliest_variance(lost + added, won + added, n - lost - won + 2 * added, drop)
        return float(abs(drop - estimate) - step / 2 - z * np.sqrt(variance / n * (total - n) / (total - 1)))

    least, most = (lost - won - total + n) / total, (lost - won + total - n) / total
    low = root_scalar(excess, bracket=(least, estimate), xtol=1e-12).root if excess(least) > 0 else least
    high = root_scalar(excess, bracket=(estimate, most), xtol=1e-12).root if excess(most) > 0 else most
    return 100 * low, 100 * high


@pytest.mark.parametrize(
    "n, total, lost, won",
    [
        (256, 10_000, 0, 0), (256, 10_000, 1, 0), (512, 10_000, 3, 9), (1024, 10_000, 512, 0),
        (768, 1000, 2, 2), (950, 1000, 40, 10), (256, 10_000, 256, 0), (256, 10_000, 1, 252), (40, 50_000, 20, 20),
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.05, LOOK_ALPHA, 0.001])
def test_interval_solves_the_score_equation(n, total, lost, won, alpha):
    found = drop_interval(n, total, lost, won, alpha)

    assert found == pytest.approx(reference_interval(n, total, lost, won, alpha), abs=2e-4)


@pytest.mark.parametrize("lost, won", [(60, 60), (120, 10), (0, 200), (700, 100)])
def test_interval_of_many_flips_among_endless_images_is_tangos(lost, won):
    low, high = drop_interval(1000, 10**9, lost, won, 0.05)
    tango = reference_interval(1000, 10**9, lost, won, 0.05, added=0, step=0)

    assert (low, high) == pytest.approx(tango, abs=0.01 * (tango[1] - tango[0]))


@given(samples())
def test_interval_holds_the_estimate_and_only_what_is_possible(sample):
    n, total, lost, won = sample
    low, high = drop_interval(n, total, lost, won)
    unseen = total - n

    assert low <= 100 * (lost - won) / n + 1e-9
    assert high >= 100 * (lost - won) / n - 1e-9
    assert low >= 100 * (lost - won - unseen) / total - 1e-9
    assert high <= 100 * (lost - won + unseen) / total + 1e-9


@given(samples())
def test_exchange_of_lost_and_won_turns_the_interval_round(sample):
    n, total, lost, won = sample
    low, high = drop_interval(n, total, lost, won)

    assert drop_interval(n, total, won, lost) == (-high, -low)


@given(samples(largest=5000), st.integers(2, 5))
def test_interval_shrinks_with_more_images_at_equal_rates(sample, times):
    n, total, lost, won = sample
    total *= times
    few_low, few_high = drop_interval(n, total, lost, won)
    low, high = drop_interval(times * n, total, times * lost, times * won)

    assert high - low < few_high - few_low


@given(samples())
def test_more_confidence_is_a_wider_interval(sample):
    low, high = drop_interval(*sample, alpha=0.05)
    wide_low, wide_high = drop_interval(*sample, alpha=0.01)

    assert wide_low <= low + 1e-9
    assert wide_high >= high - 1e-9


@given(samples())
def test_interval_of_all_images_is_their_drop(sample):
    total, _, lost, won = sample

    assert drop_interval(total, total, lost, won) == (100 * ((lost - won) / total),) * 2


def test_no_flips_do_not_make_an_interval_without_width():
    low, high = drop_interval(256, 10_000, 0, 0)

    assert low == -high
    assert 100 * 3 / 256 < high < 100 * 6 / 256  # the rule of three is one-sided, at 95 %


def test_one_flip_may_hide_among_the_images_not_seen():
    low, high = drop_interval(900, 1000, 0, 0)

    assert -low == high >= 0.1


def test_interval_near_a_full_drop_has_a_width_and_ends_there():
    low, high = drop_interval(256, 10_000, [256, 254], [0, 0])

    assert high[0] == 100
    assert 95 < low[0] < 99
    assert 99 < high[1] <= 100
    assert low[1] < low[0]


def test_points_are_judged_as_each_by_itself():
    rule = StopRule(10_000, 256, 0.5)
    lost, won = np.array([0, 3, 50, 512, 7]), np.array([0, 3, 10, 0, 300])
    together = rule.judge(512, lost, won)
    alone = [rule.judge(512, *counts) for counts in zip(lost, won, strict=True)]

    for field in range(4):
        assert together[field].tolist() == [one[field] for one in alone]


def test_a_point_is_known_when_both_ends_are_within_the_error_or_a_tenth_of_the_drop():
    low, high, drop = np.array(
        [[0.4, 1.4, 1.0], [0.4, 1.6, 1.0], [-0.6, 0.4, 0.0], [45, 55, 50], [44, 54, 50]]
    ).T

    assert is_known(low, high, drop, 0.5).tolist() == [False, False, False, True, False]
    assert is_known(low, high, drop, 0.6).tolist() == [True, True, True, True, False]
    assert is_known(-high, -low, -drop, 0.6).tolist() == [True, True, True, True, False]


def test_known_at_the_last_look_at_the_latest():
    judged = StopRule(1000, 256, 0.001).judge(1000, [0, 37, 500, 1000], [0, 38, 500, 0])

    assert judged.known.all()
    assert judged.low.tolist() == judged.high.tolist() == judged.drop.tolist() == [0, -0.1, 0, 100]


def test_points_without_flips_and_points_of_a_large_drop_need_few_images():
    rule = StopRule(10_000, 256, 0.5)

    assert rule.judge(256, 0.8 * 256 // 1, 0).known
    assert not rule.judge(768, 0, 0).known
    assert rule.judge(1024, 0, 0).known


def test_looks_come_after_blocks_and_grow_by_a_tenth():
    assert looks(10_000, 256)[:4] == (256, 512, 768, 1024)
    assert looks(10_000, 256)[-6:] == (7168, 7680, 8448, 9216, 9984, 10_000)
    assert looks(1000, 100) == (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    assert looks(100, 256) == (100,)
    assert looks(256, 256) == (256,)
    assert looks(1, 1) == (1,)


@given(st.integers(1, 100_000), st.integers(1, 3000))
def test_looks_rise_to_the_total(total, block):
    found = np.array(looks(total, block))
    steps = np.diff(found[:-1])

    assert found[-1] == total
    assert (np.diff(found) > 0).all()
    assert (found[:-1] % block == 0).all()
    assert (found[:-1] >= 32).all()
    assert (steps <= np.maximum(block, found[:-2] / 10)).all()


@pytest.mark.parametrize("error, got", [(0, "0"), (-0.5, "-0.5"), (100, "100"), (float("nan"), "nan")])
def test_error_out_of_range_is_refused(error, got):
    with pytest.raises(UsageError) as refused:
        StopRule(1000, 256, error)

    assert str(refused.value) == (
        f"--sense-error: must be above 0 and below 100 percentage points, got {got}; "
        "0.5 is a usual value, without the flag every image is looked at"
    )


def swept(rule, lost_in_all, won_in_all, repetitions, random):
    """(share of intervals, at the look where each stopped, that cover the drop on all images; mean images used)"""
    lost = won = np.zeros(repetitions, int)
    drop, covered, used, seen = 100 * (lost_in_all - won_in_all) / rule.total, 0, 0, 0
    for n in rule.looks:
        left, lost_left, won_left = rule.total - seen, lost_in_all - lost, won_in_all - won
        more = random.hypergeometric(lost_left, left - lost_left, n - seen)
        won = won + random.hypergeometric(won_left, left - lost_left - won_left, n - seen - more)
        lost = lost + more
        pairs, which = np.unique(np.stack([lost, won]), axis=1, return_inverse=True)
        judged = rule.judge(n, *pairs)
        covers = (judged.low <= drop + 1e-9) & (judged.high >= drop - 1e-9)
        stopped, seen = judged.known[which], n
        covered += covers[which][stopped].sum()
        used += n * stopped.sum()
        lost, won = lost[~stopped], won[~stopped]
    assert not lost.size
    return covered / repetitions, used / repetitions


@pytest.mark.parametrize("total, error", [(1000, 0.5), (1000, 2.0), (10_000, 0.5), (10_000, 2.0)])
def test_intervals_at_the_look_that_stopped_cover_the_drop(total, error):
    rule, random, coverages = StopRule(total, 256, error), np.random.default_rng(1), {}
    for flips in (0, total // 1000, total // 200, total // 50, total // 10, total // 2):
        for lost in {flips, round(0.75 * flips), flips // 2}:
            coverages[lost, flips - lost], _ = swept(rule, lost, flips - lost, 1500, random)

    assert len(coverages) >= 15
    assert min(coverages.values()) >= 0.95, coverages


def exact_coverage(rule, lost_in_all, won_in_all):
    """As `swept`, by the probabilities of all ways that few flips can come in."""
    drop, covered, seen, ways = 100 * (lost_in_all - won_in_all) / rule.total, 0.0, 0, {(0, 0): 1.0}
    for n in rule.looks:
        arrived: dict[tuple[int, int], float] = {}
        for (lost, won), probability in ways.items():
            left = lost_in_all - lost, won_in_all - won
            groups = [*left, rule.total - seen - sum(left)]
            more = [(i, j, n - seen - i - j) for i in range(left[0] + 1) for j in range(left[1] + 1)]
            chances = multivariate_hypergeom.pmf(more, groups, n - seen)
            for (i, j, _), chance in zip(more, chances, strict=True):
                arrived[lost + i, won + j] = arrived.get((lost + i, won + j), 0.0) + probability * chance
        lost, won = zip(*arrived, strict=True)
        judged, ways, seen = rule.judge(n, lost, won), {}, n
        for index, (counts, probability) in enumerate(arrived.items()):
            if not judged.known[index]:
                ways[counts] = probability
            elif judged.low[index] - 1e-9 <= drop <= judged.high[index] + 1e-9:
                covered += probability
        if not ways:
            return covered
    raise AssertionError(f"not known after all images: {ways}")


@pytest.mark.parametrize("total, block, error", [(1000, 256, 0.5), (1000, 100, 0.3), (2000, 256, 0.2)])
def test_few_flips_that_hide_in_the_images_not_seen_are_covered(total, block, error):
    rule = StopRule(total, block, error)
    coverages = {(i, j): exact_coverage(rule, i, j) for i in range(4) for j in range(i + 1)}

    assert min(coverages.values()) >= 0.95, coverages
