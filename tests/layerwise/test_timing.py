from __future__ import annotations

from torch import nn

from distiller.layerwise import timing
from distiller.layerwise.timing import time_in_turns


def test_a_stall_now_and_then_leaves_median_and_quartiles_alone(monkeypatch):
    real, seen = timing.measure_latencies, []
    seconds = iter([9.0, 1.0, 2.0, 3.0, 4.0, 500.0])  # the first is of the warm-up

    def measured(models, shape, batch_size, **options):
        seen.append(options["warmup"])
        (found,) = real(models, shape, batch_size, **options)
        return [type(found)(next(seconds), 0, 0, 1, found.batch_size, found.threads, found.device)]

    monkeypatch.setattr(timing, "measure_latencies", measured)
    (found,) = time_in_turns([nn.Linear(3, 2)], (3,), 4, min_time=60, max_repeats=5)
    assert (found.median_s, found.q1_s, found.q3_s, found.repeats) == (3.0, 2.0, 4.0, 5)
    assert (found.batch_size, found.device) == (4, "cpu")
    assert seen == [1, 0, 0, 0, 0, 0]


def test_models_take_turns_and_each_is_the_first_as_often():
    calls = []

    class Recorded(nn.Linear):
        def forward(self, input):
            calls.append(self.out_features)
            return super().forward(input)

    first, second = time_in_turns([Recorded(3, 1), Recorded(3, 2)], (3,), 4, min_time=0, max_repeats=3)
    assert (first.repeats, second.repeats) == (3, 3)
    assert calls == [1, 2, 1, 2, 1, 2, 2, 1, 1, 2]
    assert first.q1_s <= first.median_s <= first.q3_s
