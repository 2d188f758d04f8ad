"""Long work beside the page: reports, results, errors, and an end when nobody reads."""

import contextlib
import threading
import time

import pytest

from app.service import jobs
from app.service.jobs import Cancelled, Finished, in_thread, one_by_one


def test_reports_come_in_order_and_the_result_last():
    def work(report):
        for at in range(5):
            report(at)
        return "done"

    assert [one for one in one_by_one(in_thread(work)) if one is not None] == [0, 1, 2, 3, 4, Finished("done")]


def test_an_error_of_the_work_is_raised_to_the_reader():
    def work(report):
        report("first")
        raise ValueError("no good")

    run = one_by_one(in_thread(work))
    assert next(run) == "first"
    with pytest.raises(ValueError, match="no good"):
        list(run)


def test_without_a_thread_left_nothing_is_held(monkeypatch):
    """What must be done at the end is done here; what can't begin is over at once."""
    def start(self):
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr("threading.Thread.start", start)
    jobs.beside(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(RuntimeError, match="new thread"):
        jobs.in_thread(lambda report: None)


def test_work_that_nobody_reads_ends_at_its_next_report():
    ended = threading.Event()

    def work(report):
        try:
            for at in range(10_000):
                report(at)
                time.sleep(0.001)
        except Cancelled:
            ended.set()
            raise

    with contextlib.closing(one_by_one(in_thread(work))) as run:
        next(run)
    assert ended.wait(10)
