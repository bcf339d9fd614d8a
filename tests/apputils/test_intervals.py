import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from distiller.apputils.intervals import wilson_interval
from distiller.errors import UsageError


@pytest.mark.parametrize("k, n", [(0, 10), (10, 10), (1, 1), (0, 1), (329, 360), (9150, 10000), (50, 100)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_interval_agrees_with_scipy(k, n, confidence):
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_of_a_worked_example():
    # Newcombe 1998, table I: 81/263 has the 95 % score interval 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_rate_and_stays_within_0_and_1(counts):
    k, n = counts
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n + 1e-12
    assert k / n - 1e-12 <= high <= 1


@pytest.mark.parametrize("k, n, confidence", [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_interval_of_impossible_counts_is_refused(k, n, confidence):
    with pytest.raises(UsageError) as error:
        wilson_interval(k, n, confidence)
    assert str(error.value) == (
        "interval: wants 0 <= k <= n, n >= 1 and 0 < confidence < 1, "
        f"got k={k}, n={n}, confidence={confidence}"
    )
