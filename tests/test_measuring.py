"""Sweeps, benches, estimates and conversions on behalf of the page, on a tiny pair."""

import contextlib
import dataclasses
import json
import threading
import time

import pytest
from talkers import columns, talker

from app.errors import UserError
from app.service import Limits, Request, Service, conversions, measuring
from app.service.conversions import Plan
from modification.loading import load_dense_or_mod

TEXT = "Once there was a fox who lived by the river and counted the boats. " * 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return {"tiny-MoD": talker(root / "mod"), "tiny": talker(root / "dense", dense=True)}


@pytest.fixture
def service(folders, tmp_path):
    return Service(folders, limits=Limits(running=1), converted=tmp_path / "converted")


def results(updates):
    return [update.result for update in updates if update.result is not None]


# Sweeps


def test_a_sweep_grows_point_by_point_with_the_dense_loss_beside_it(service):
    found = results(service.lab.sweep("tiny-MoD", "tiny", TEXT, [0.0, 0.5, 1.0], 0.02))
    assert [len(one.points) for one in found] == [1, 2, 3, 3]
    last = found[-1]
    assert last.parent == "tiny (dense)"
    assert last.points[0].quality.loss == pytest.approx(last.dense, abs=1e-4), "p = 0 is the dense parent"
    assert [one.quality.p for one in last.points] == [0.0, 0.5, 1.0]
    loads = [one.quality.load for one in last.points]
    assert loads[0] == 1.0 > loads[1] > loads[2]
    assert last.points[0].kv == 1.0 > last.points[1].kv > last.points[2].kv
    assert all(one.speed > 0 for one in last.points)


def test_almost_all_of_a_text_is_scored(service):
    """Blocks are cut so that little is left over."""
    found = results(service.lab.sweep("tiny-MoD", None, TEXT, [0.0], 0.02))[-1]
    assert len(TEXT) - 8 <= found.tokens <= len(TEXT)
    assert found.parent == "tiny-MoD at p = 0"


def test_the_best_p_is_the_largest_up_to_which_the_loss_holds(service):
    everything = results(service.lab.sweep("tiny-MoD", "tiny", TEXT, [0.0, 0.5, 1.0], 10.0))[-1]
    assert everything.best.quality.p == 1.0
    nothing = results(service.lab.sweep("tiny-MoD", "tiny", TEXT, [0.5, 1.0], -0.9))[-1]
    assert nothing.best is None


def test_a_sweep_left_early_frees_its_place(service):
    run = service.lab.sweep("tiny-MoD", "tiny", TEXT, [0.0, 0.5, 1.0], 0.02)
    next(one for one in run if one.result is not None)
    run.close()
    assert results(service.lab.sweep("tiny-MoD", "tiny", TEXT, [1.0], 0.02))


@pytest.mark.parametrize(("text", "grid", "sentence"), [
    ("short", [0.5], "at least 32"), ("x" * 400_001, [0.5], "at most 400,000 characters"),
    (TEXT, [], "one or more numbers"), (TEXT, [1.5], "from 0 to 1"),
])
def test_a_bad_sweep_is_a_sentence(service, text, grid, sentence):
    with pytest.raises(UserError, match=sentence):
        list(service.lab.sweep("tiny-MoD", None, text, grid, 0.02))


# Benches and estimates


def test_a_bench_tells_its_rounds_and_gives_every_side(service):
    found = results(service.lab.bench("tiny-MoD", "tiny", [16], [0.5], 4, 2, True))
    assert "context 16, batch 1: 1 of 2" in found
    assert [result.side for result in found[-1]] == ["stock generate", "engine, p = 0", "load 0.5"]


@pytest.mark.parametrize("parent", ["tiny", None])
def test_the_dense_side_of_a_bench_is_a_stock_model(service, monkeypatch, parent):
    """Models are held with routers; transformers' own generate is timed without them."""
    from modification import MoDModel

    met = []
    monkeypatch.setattr(measuring, "bench", lambda model, dense, **options: met.append((model, dense)) or [])
    results(service.lab.bench("tiny-MoD", parent, [16], [0.5], 4, 1, True))
    model, dense = met[0]
    assert isinstance(model, MoDModel)
    assert not isinstance(dense, MoDModel)


@pytest.mark.parametrize(("changes", "what"), [
    ({"contexts": [16] * 9}, "contexts"), ({"loads": [0.5] * 9}, "loads"), ({"new_tokens": 5000}, "decode steps"),
    ({"rounds": 500}, "rounds"),
])
def test_a_bench_that_would_take_too_long_is_refused(service, changes, what):
    asked = {"contexts": [16], "loads": [0.5], "new_tokens": 4, "rounds": 1, "stock": False, **changes}
    with pytest.raises(UserError, match=f"{what} are too many"):
        results(service.lab.bench("tiny-MoD", None, **asked))


def test_a_bench_lets_others_at_the_model(folders):
    """A run that comes while it measures ends before it does."""
    service = Service(folders, limits=Limits(running=2))
    begun, served, ended = (threading.Event() for _ in range(3))

    def measure():
        for update in service.lab.bench("tiny-MoD", None, [100] * 8, [0.5, 0.3, 0.2], 20, 20, True):
            if update.result is not None:
                begun.set()
            if served.is_set():
                return
        ended.set()

    thread = threading.Thread(target=measure)
    thread.start()
    assert begun.wait(60)
    *_, last = service.run("somebody", 0.5, Request("Once", "tiny-MoD", max_new_tokens=60, temperature=0.0))
    assert sum(column[5] == "n" for column in columns(last.tape)) == 60
    served.set()
    thread.join()
    assert not ended.is_set()


def test_one_bench_at_a_time(folders):
    """The next one waits in line, first of it, though there are places."""
    service = Service(dict(folders))
    asked = {"contexts": [16], "loads": [1.0], "new_tokens": 4, "rounds": 20, "stock": False}
    with contextlib.closing(service.lab.bench("tiny-MoD", None, **asked)) as first:
        next(one for one in first if one.result is not None)
        with contextlib.closing(service.lab.bench("tiny-MoD", None, **asked)) as second:
            assert next(second).waiting == 0
    assert results(service.lab.bench("tiny-MoD", None, **{**asked, "rounds": 1}))


def test_a_measurement_ends_in_time(folders):
    """With a sentence; what came until then was shown."""
    hasty = Service(dict(folders), limits=Limits(measuring=0.0))
    run, shown = hasty.lab.sweep("tiny-MoD", None, TEXT, [0.0, 0.5, 1.0], 0.02), []
    with pytest.raises(UserError, match=r"ended after 0 minutes.*Ask for less"):
        shown.extend(run)
    assert len(results(shown)) <= 1
    assert hasty.desk.turnstile.count() == (0, 0)


def test_a_bench_without_a_parent_restores_one(service):
    found = results(service.lab.bench("tiny-MoD", None, [16], [0.5], 4, 1, False))[-1]
    assert [result.side for result in found] == ["engine, p = 0", "load 0.5"]


def test_a_bench_beyond_the_context_is_a_sentence(service):
    with pytest.raises(UserError, match="model's context of 128"):
        list(service.lab.bench("tiny-MoD", None, [500], [0.5], 4, 1, False))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"source": "nonsense"}, "neither a model folder"), ({"context": 0}, "must be 1 or more"),
    ({"load": 2.0}, "from 0 to 1"), ({"dtype": "int3"}, "choose among"), ({"device": "abacus"}, "choose among"),
    ({"layers": "outer"}, "layers"),
])
def test_a_bad_estimate_is_a_sentence(service, changes, sentence):
    asked = {"source": "llama-2-7b", "context": 10, "batch": 1, "load": 0.5, "dtype": "bf16", "layers": "own",
             "device": "h200", **changes}
    with pytest.raises(UserError, match=sentence):
        service.lab.estimate(**asked)


# Conversions


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"{TEXT} {at}" for at in range(30)))
    return path


def plan(text, **changes):
    return Plan(**{"parent": "tiny", "name": "made", "data": str(text), "tokens": 20 * 8 * 16, "block": 16, "batch": 8,
                   **changes})


def begun_again(service, wanted):
    """The last word of a conversion; None while the one before it has not ended."""
    with contextlib.suppress(UserError):
        return list(service.convert(wanted))[-1]
    return None


def test_a_cancelled_conversion_keeps_its_checkpoint_goes_on_and_ends_in_a_listed_model(service, text, monkeypatch):
    monkeypatch.setattr(conversions, "_POLL", 0.05)
    long = plan(text, tokens=60 * 8 * 16)
    run = service.convert(long)
    while not next(run).log:  # before the first checkpoint is due: it is written because the run is cancelled
        pass
    run.close()
    checkpoints = service.conversions.folder / "made" / "checkpoints"
    end = time.monotonic() + 60
    while not list(checkpoints.glob("*/trainer_state.json")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert "made" not in service.conversions.finished()
    while (again := begun_again(service, long)) is None:  # it is on its way out
        assert time.monotonic() < end
        time.sleep(0.2)
    assert again.failed
    assert "unfinished conversion" in again.ended
    *_, last = service.convert(dataclasses.replace(long, resume=True))
    assert not last.failed, last.ended
    assert last.ended.startswith("Converted")
    assert [record["step"] for record in last.log] == [10, 20, 30, 40, 50, 60], "no step is told twice"
    assert all(0 <= load <= 1 for load in last.log[-1]["layer_loads"])
    assert len(last.log[-1]["layer_loads"]) == 2
    assert "made" in service.names()
    assert service.open("made").trained
    report = json.loads((service.conversions.folder / "made" / "report.json").read_text())
    assert report["recipe"] == "any-p"


def test_an_app_that_ends_has_its_conversion_leave_a_checkpoint(service, text):
    """And waits for it."""
    run, told = service.convert(plan(text, tokens=2000 * 8 * 16)), []
    while not next(run).log:
        pass
    reader = threading.Thread(target=lambda: told.extend(run))
    reader.start()
    assert service.shut_down(60)
    reader.join(60)
    assert told[-1].failed
    assert "--resume goes on" in told[-1].ended
    assert service.conversions.unfinished()["made"] > 0
    with pytest.raises(UserError, match="shutting down"):
        next(service.convert(plan(text, name="other")))


def test_more_rows_than_memory_holds_are_refused_before_they_are_run(service, text, monkeypatch):
    """The estimate times a step of that size."""
    model, _ = load_dense_or_mod(service.library.listed["tiny"])
    monkeypatch.setattr(conversions, "available_bytes", lambda *_: 50_000_000)
    monkeypatch.setattr(conversions, "load_dense_or_mod", lambda *_, **__: (model, None))
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("it ran"))
    with pytest.raises(UserError, match="choose fewer rows"):
        service.estimate_conversion(plan(text, block=4096, batch=512, tokens=10 * 4096 * 512))


def test_a_card_shows_no_picture_and_no_tag_even_where_it_looks_like_code(tmp_path):
    """What a browser takes for code is not what a pattern takes for it."""
    card = "\\`![x](http://evil/p.png)\\` `![y](z)` <img src=q> ```<b>``` a < b"
    (tmp_path / "README.md").write_text(card)
    shown = measuring.card_of(str(tmp_path))
    assert "![" not in shown
    assert "<i" not in shown
    assert "<b" not in shown
    assert "a < b" in shown
    assert shown.replace("\u200b", "") == card


def test_one_conversion_at_a_time(service, text, monkeypatch):
    monkeypatch.setattr(conversions, "_PATIENCE", 0.1)
    first = service.convert(plan(text))
    next(first)
    with pytest.raises(UserError, match="one at a time"):
        next(service.convert(plan(text, name="other")))
    first.close()


def test_time_and_memory_are_estimated_beforehand(service, text):
    seconds, taken, free = service.estimate_conversion(plan(text))
    more, same, _ = service.estimate_conversion(plan(text, tokens=2000 * 8 * 16))
    assert 0 < seconds < more
    assert 0 < taken == same
    assert free > 0


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"name": "../x"}, "no name for a model folder"), ({"name": ""}, "no name"), ({"data": "/no/such"}, "no text file"),
    ({"data": "x" * 5000}, "no path"), ({"data": "a\0b"}, "no path"),
    ({"parent": "x" * 5000}, "at most 4,096 characters"),
    ({"tokens": 10}, "give at least"), ({"parent": "--help"}, "neither a folder"),
])
def test_a_plan_that_will_not_do_is_a_sentence(service, text, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        list(service.convert(plan(text, **changes)))


def test_a_conversion_that_fails_says_why(service, text):
    """A MoD model can't be converted once more: the command's own sentence is shown."""
    last = list(service.convert(plan(text, parent="tiny-MoD")))[-1]
    assert last.failed
    assert "is a MoD model already" in last.ended
    assert "Traceback" not in last.ended


def test_a_shared_app_converts_nothing_and_says_where_to(folders, text, tmp_path):
    service = Service(folders, limits=Limits(convert=False), converted=tmp_path)
    with pytest.raises(UserError, match="python -m modification convert"):
        list(service.convert(plan(text)))
