"""The program's job `--sense`: what it says while a sweep runs."""

from __future__ import annotations

import logging

import pytest

from distiller.apputils import sensitivity_job
from distiller.sensitivity.sweep import SweepProgress

LEFT = {
    # When each block is done, in seconds; a block takes 10 s. Before the first much is prepared.
    1: ((100, 110, 120, 130), ("", "  about 20 s left", "  about 10 s left", "  about 0 s left")),
    # Two processes end theirs together: the second block tells nothing yet.
    2: ((100, 101, 110, 111), ("", "", "  about 5 s left", "  about 0 s left")),
}


@pytest.mark.parametrize("jobs", LEFT)
def test_the_time_left_is_told_from_blocks_that_were_waited_for(jobs, monkeypatch, caplog):
    done, expected = LEFT[jobs]
    caplog.set_level(logging.INFO)
    times = iter(done)
    monkeypatch.setattr(sensitivity_job.time, "perf_counter", lambda: next(times))
    report = sensitivity_job._Reporter()
    for number in range(1, 5):
        report(SweepProgress(number, 4, number, 0, 7, jobs))
    assert caplog.messages == [
        f"[{number}/4 blocks of images, 0/7 points known]{left}"
        for number, left in enumerate(expected, start=1)
    ]
