"""Time, peak memory and profile against steps whose cost is known."""

import sys

import measure
import pytest
import torch

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')


def test_time_interleaved_runs_every_step_once_in_each_round(monkeypatch):
    """The steps take one and two seconds of a clock of their own; the second one is slower in the last round."""
    calls, clock = [], 0.0

    def step(name, *seconds):
        seconds = iter(seconds)

        def run():
            nonlocal clock
            calls.append(name)
            clock += next(seconds)

        return run

    monkeypatch.setattr(measure, 'timer', lambda: clock)
    first, second = measure.time_interleaved([step('a', 1, 1, 1), step('b', 2, 2, 4)], 3)
    assert calls == ['a', 'b'] * 3
    assert (first.times, second.times) == ([1, 1, 1], [2, 2, 4])
    assert (second.median, second.iqr) == (2, 1)


@pytest.mark.parametrize('mib', [64, 300])
def test_peak_memory_is_that_of_the_step(mib):
    before = torch.ones(400 * MIB // 4, device=measure.DEVICE)  # a higher peak, and freed
    del before
    peak = measure.peak_memory(lambda: torch.ones(mib * MIB // 4, device=measure.DEVICE).sum())
    assert peak == pytest.approx(mib * MIB, abs=30 * MIB)


def test_profile_operators_add_up_to_the_step(monkeypatch):
    """The seconds of all operators, each without those that it calls, are the seconds of the top-level operators."""
    profiles, linear = [], torch.nn.Linear(64, 64)

    class RecordedProfile(torch.profiler.profile):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            profiles.append(self)

    monkeypatch.setattr(torch.profiler, 'profile', RecordedProfile)
    found = measure.profile_operators(lambda: torch.nn.functional.gelu(linear(torch.ones(300, 64))))
    assert {'aten::linear', 'aten::addmm', 'aten::gelu'} < set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    top = [event for event in profiles[0].events() if event.cpu_parent is None]
    assert sum(found.values()) == pytest.approx(1e-6 * sum(event.cpu_time_total for event in top), rel=1e-3)
