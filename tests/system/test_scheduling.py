"""Cores wanted and got: thread times of this process and its children, and the cost of waiting."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.system import scheduling
from fastmnist.system.scheduling import CoreUse, core_use, stopped_share, thread_times

needs_scheduling = pytest.mark.skipif(thread_times() is None, reason="this system counts no waits for cores")


@needs_scheduling
def test_a_busy_thread_is_counted():
    before, ran = thread_times(), time.thread_time()
    while time.thread_time() - ran < 0.1:
        pass
    use = core_use(before, thread_times(), 1.0)
    assert use.ran > 0.05
    assert use.cores_wanted >= use.cores_got > 0


@needs_scheduling
def test_a_child_is_counted_apart():
    before, use = thread_times(), CoreUse(1.0, 0.0, 0.0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            until = time.monotonic() + 60
            while use.workers_ran + use.workers_waited < 0.1 and time.monotonic() < until:
                use = core_use(before, thread_times(), 1.0)
        finally:
            child.kill()
    assert use.workers >= 1
    assert use.workers_ran + use.workers_waited >= 0.1


def test_a_system_that_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(scheduling, "PROCESSES", tmp_path)
    assert thread_times() is None
    folder = tmp_path / str(os.getpid()) / "task" / str(os.getpid())
    folder.mkdir(parents=True)
    (folder / "schedstat").write_text("0 0 0\n")
    assert thread_times() is None


amounts = st.floats(0, 8)


@given(amounts, amounts, amounts, amounts, st.floats(0, 1))
def test_the_cost_of_waiting(ran, waited, workers_ran, workers_waited, waiting):
    use = CoreUse(1.0, ran, waited, 2, workers_ran, workers_waited)
    assert 0 <= use.lost(waiting) <= 1
    assert use.lost(0.0) == pytest.approx(waited / max(1.0, ran + waited))
    assert use.lost(waiting) <= max(use.lost(0.0), waiting)
    assert use.cores_wanted >= use.cores_got
    twice = use + use
    assert twice.lost(waiting) == pytest.approx(use.lost(waiting))
    assert twice.cores_wanted == pytest.approx(use.cores_wanted)


def test_a_new_thread_counts_in_full_and_an_old_one_by_its_difference():
    here = os.getpid()
    before = {(here, 1): (10**9, 10**9)}
    after = {(here, 1): (2 * 10**9, 10**9), (here, 2): (10**9, 3 * 10**9), (here + 1, 5): (0, 10**9)}
    assert core_use(before, after, 2.0) == CoreUse(2.0, 2.0, 3.0, 1, 0.0, 1.0)


def test_the_share_of_throttled_periods_is_the_largest_of_all_groups():
    assert stopped_share([(4, 10)], [(4, 10)]) is None
    assert stopped_share([], []) is None
    assert stopped_share([(4, 10), (0, 0)], [(7, 20), (1, 10)]) == pytest.approx(0.3)
