"""Medians and histograms from the kernel's fine buckets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd.kernel.layout import RTT_BUCKETS, rtt_bounds_ns
from qpd.kernel.maps import RoundTrips
from qpd.model import PATHS_MAX
from qpd.rtt import Recent, distribution, quantile_ns

Counts = npt.NDArray[np.uint64]
MS = 1_000_000
nanoseconds = st.integers(2_000, 4_000_000_000)


def counted(*times_ns: int) -> Counts:
    """Samples as the kernel counts them: by the exclusive upper bounds."""
    counts = np.zeros(RTT_BUCKETS, np.uint64)
    for time in times_ns:
        counts[min(int(np.searchsorted(rtt_bounds_ns(), time, side="right")), RTT_BUCKETS - 1)] += 1
    return counts


def trips(**paths: Counts) -> RoundTrips:
    """Path ids are the digits of the names."""
    buckets = np.zeros((PATHS_MAX, RTT_BUCKETS), np.uint64)
    for name, counts in paths.items():
        buckets[int(name.strip("p"))] = counts
    return RoundTrips(buckets.sum(axis=1), np.zeros(PATHS_MAX, np.uint64), buckets)


@pytest.mark.parametrize("set_ms", [2, 22, 75])
def test_the_median_is_within_one_percent(set_ms: int) -> None:
    spread = [set_ms * MS + 3_000 * n for n in range(-20, 21)]
    median = quantile_ns(counted(*spread, 900 * MS), 0.5)
    assert median == pytest.approx(set_ms * MS, rel=0.01)


@given(st.lists(nanoseconds, min_size=1, max_size=200), st.sampled_from([0.5, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_sample_that_it_means(times: list[int], share: float) -> None:
    found = quantile_ns(counted(*times), share)
    exact = sorted(times)[max(0, int(np.ceil(share * len(times))) - 1)]
    assert found == pytest.approx(exact, rel=1 / 64)


def test_without_samples_there_is_no_median() -> None:
    assert quantile_ns(counted(), 0.5) is None


@given(st.lists(nanoseconds, max_size=200))
def test_a_histogram_loses_no_sample_and_its_bounds_are_the_kernels(times: list[int]) -> None:
    found = distribution(counted(*times), sum(times))
    assert sum(found.counts) == len(times)
    assert found.total == pytest.approx(sum(times) / 1e9)
    reached = np.cumsum(found.counts)
    for bound, count in zip(found.bounds, reached, strict=False):
        assert (
            sum(time < bound * 1e9 - 0.5 for time in times)
            <= count
            <= sum(time <= bound * 1e9 + 0.5 for time in times)
        )


@given(st.lists(nanoseconds, max_size=200))
def test_the_native_histogram_is_the_same_to_the_kernels_own_width(times: list[int]) -> None:
    native = distribution(counted(*times), 0).native
    assert native is not None
    assert sum(native.counts.values()) == len(times)
    assert list(native.counts) == sorted(native.counts)
    for bucket in native.counts:
        upper = 2.0 ** (bucket / 2**native.schema) * 1e9
        lower = upper / 2.0 ** (1 / 2**native.schema)
        assert any(lower * (1 - 1 / 64) <= time <= upper * (1 + 1 / 64) for time in times)


def test_recent_is_what_came_since_one_to_two_windows_ago() -> None:
    recent = Recent(window=10.0)
    before, after = counted(5 * MS), counted(5 * MS, 80 * MS)
    assert recent.of(3, trips(p3=before)).sum() == 1, "nothing noted yet: all there is"
    recent.take(0.0, trips(p3=before))
    assert recent.of(3, trips(p3=before)).sum() == 0, "what was there at the start is not recent"
    assert quantile_ns(recent.of(3, trips(p3=after)), 0.5) == pytest.approx(80 * MS, rel=1 / 64)
    recent.take(9.9, trips(p3=after))
    recent.take(10.0, trips(p3=after))
    assert recent.of(3, trips(p3=after)).sum() == 1, "one window later it still is"
    recent.take(20.0, trips(p3=after))
    assert recent.of(3, trips(p3=after)).sum() == 0, "two windows later it is not"


def test_an_id_that_goes_to_another_path_starts_anew() -> None:
    recent = Recent(window=10.0)
    for now in (0.0, 10.0, 20.0):
        recent.take(now, trips(p3=counted(5 * MS, 5 * MS)))
    assert recent.of(3, trips(p3=counted(7 * MS))).sum() == 1
