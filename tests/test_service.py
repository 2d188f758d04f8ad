"""The door between app and engine, without a browser: dials, queue, errors, freed places."""

import json
import threading
import time

import pytest
from talkers import byte_tokenizer, columns, talker

import app.service as service_module
from app.errors import UserError
from app.service import Limits, Request, Service
from app.service.pieces import PieceReader
from app.service.turnstile import FairLock, Turnstile
from modification.batching import Batch
from modification.executor import executor_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(folder):
    return Service({"tiny": folder}, limits=Limits(running=1, waiting=1, frame=0.0))


def request(**changes):
    return Request(**{"prompt": "Once upon a time", "model": "tiny", "max_new_tokens": 12, "seed": 3, **changes})


def tape_of(updates):
    return [update for update in updates if update.tape is not None][-1].tape


def test_a_run_streams_prompt_and_every_new_token(service):
    made = columns(tape_of(service.run("one", 0.5, request())))
    assert [column[5] for column in made] == ["p"] * 16 + ["n"] * 12
    assert "".join(column[1] for column in made[:16]) == "Once upon a time"


def test_the_dial_moved_in_mid_run_changes_the_tokens_that_follow(service, monkeypatch):
    allowed, step = threading.Semaphore(6), Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: step(batch) if allowed.acquire(timeout=30) else [])
    run = service.run("one", 0.0, request(temperature=0.0))
    while not any(len(columns(update.tape)) == 16 + 5 for update in run if update.tape):
        pass
    service.set_p("one", 1.0)
    allowed.release(100)
    made = columns(tape_of(run))
    thresholds = [column[2] for column in made]
    assert thresholds[0] == 0.0
    assert thresholds[-1] == 1.0
    assert made[0][4] == "3"
    assert made[-1][4] == "0"


def test_one_sessions_dial_is_not_anothers(service):
    alone = columns(tape_of(service.run("a", 0.3, request())))
    run = service.run("a", 0.3, request())
    next(run)
    service.set_p("b", 1.0)
    assert columns(tape_of(run)) == alone


def test_two_runs_at_once_give_what_each_gives_alone(folder):
    service = Service({"tiny": folder}, limits=Limits(running=2, frame=0.0))
    wanted = {p: columns(tape_of(service.run("x", p, request()))) for p in (0.2, 0.7)}
    got = {}

    def go(p):
        got[p] = columns(tape_of(service.run(f"user {p}", p, request())))

    threads = [threading.Thread(target=go, args=(p,)) for p in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


@pytest.fixture
def held(service, monkeypatch):
    """No token is decoded until this event is set."""
    go, executor = threading.Event(), executor_of(service.open("tiny").model)
    decode = executor.decode
    monkeypatch.setattr(executor, "decode", lambda *arguments: go.wait(60) and decode(*arguments))
    yield go
    go.set()


def test_who_waits_is_told_and_gets_in_when_the_first_leaves(service, held):
    first = service.run("a", 0.5, request())
    next(first)
    second = service.run("b", 0.5, request())
    assert next(second).waiting == 0
    held.set()
    first.close()
    assert columns(tape_of(second))


def test_a_full_queue_is_a_sentence(service, held):
    first, second = service.run("a", 0.5, request()), service.run("b", 0.5, request())
    next(first)
    next(second)
    with pytest.raises(UserError, match="queue is full"):
        next(service.run("c", 0.5, request()))
    held.set()
    second.close()
    first.close()


def test_closing_a_run_frees_its_cache_and_its_place(service, monkeypatch):
    made = []
    model = service.open("tiny").model
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda: made.append(new_cache()) or made[-1], raising=False)
    run = service.run("a", 0.5, request(max_new_tokens=50))
    next(run)
    next(run)
    assert made[0].nbytes().stored > 0
    run.close()
    assert made[0].nbytes().allocated == 0
    assert columns(tape_of(service.run("b", 0.5, request())))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"prompt": "   "}, "prompt is empty"),
    ({"prompt": "x" * 300_000}, "300,000 characters"),
    ({"prompt": "long " * 200}, "context of 128"),
    ({"model": ""}, "Choose a model"),
    ({"model": "/no/such/folder"}, "neither a folder here nor a Hub id"),
    ({"model": "../no/such"}, "neither a folder here nor a Hub id"),
    ({"temperature": -1.0}, "Temperature -1: give a number from 0 to 10"),
])
def test_bad_input_is_a_sentence_and_the_place_is_free_again(service, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        list(service.run("a", 0.5, request(**changes)))
    assert columns(tape_of(service.run("a", 0.5, request())))


def test_a_folder_that_is_no_model_is_a_sentence(service, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="it has no config"):
        list(service.run("a", 0.5, request(model=str(tmp_path))))


def test_the_least_recent_model_is_dropped(folder, tmp_path):
    service = Service({"a": folder, "b": folder, "c": folder}, limits=Limits(models=2))
    first = service.open("a")
    service.open("b")
    assert service.open("a") is first
    service.open("c")
    assert service.open("a") is first, "used most recently but one"


@pytest.mark.parametrize("text", ["plain words", " leading space", "naïve café", "雪の灯り 🏮 end", "\n\ttabs"])
def test_pieces_add_up_to_the_text(text):
    tokenizer = byte_tokenizer()
    reader = PieceReader(tokenizer)
    pieces = [reader.read(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(piece.text for piece in pieces) == text
    assert reader.read(1).special


@pytest.mark.parametrize("damage", [
    {"info": {"anchors": None}}, {"info": {"special": 5}}, {"info": {"shape": 3}}, {"info": 7},
    {"info": {"shape": {"layer_weights": "many"}}}, {"info": {"likely": {"a": 1}}}, {"depth": 10**9}, {"depth": 0},
    {"mod_layers": [9]}, {"mod_layers": [2, 1]}, {"mod_layers": [1, 1]}, {"texts": ["a" * 1001]},
    {"info": {"title": "a" * 1001}}, {"info": {"likely": [["a" * 1001]]}},
    {"steps": [{"tokens": [1]}]}, {"format": 99}, {"texts": ["a", "b"]},
])
def test_a_broken_trace_is_a_sentence(service, damage):
    """Whatever is wrong with it: nothing else than UserError."""
    one = {
        "tokens": [1], "logprobs": [None], "scores": [[0.5], [0.5]], "routed": [[1], [0]], "p": 0.5, "kv": [1, 1, 2],
        "seconds": 0.1, "prefill": True,
    }
    whole = {"format": 1, "depth": 4, "mod_layers": [1, 2], "texts": ["a"], "info": {}, "steps": [one]}
    assert columns(service.read_trace(json.dumps(whole).encode()))
    with pytest.raises(UserError, match="can't be shown"):
        service.read_trace(json.dumps({**whole, **damage}).encode())


@pytest.mark.parametrize("change", [
    {"scores": [[5.0], [0.5]]}, {"scores": [[float("nan")], [0.5]]}, {"seconds": float("inf")}, {"p": 2}, {"kv": [1]},
    {"logprobs": []}, {"routed": [[1]]}, {"tokens": []},
])
def test_a_step_that_cannot_be_is_a_sentence(service, change):
    """Scores and p from 0 to 1, finite seconds, shapes that fit."""
    one = {
        "tokens": [1], "logprobs": [None], "scores": [[0.5], [0.5]], "routed": [[1], [0]], "p": 0.5, "kv": [1, 1, 2],
        "seconds": 0.1, "prefill": True, **change,
    }
    whole = {"format": 1, "depth": 4, "mod_layers": [1, 2], "texts": ["a"], "info": {}, "steps": [one]}
    with pytest.raises(UserError, match="can't be shown"):
        service.read_trace(json.dumps(whole).encode())


@pytest.mark.parametrize(("layers", "tokens"), [(2, 100_001), (1000, 4_001)])
def test_a_trace_of_too_many_scores_is_refused_before_it_is_built(service, layers, tokens):
    """A few MB of JSON could make hundreds of MB of columns."""
    step = {"tokens": [1] * tokens}
    whole = {"format": 1, "depth": layers, "mod_layers": list(range(layers)), "texts": [], "info": {}, "steps": [step]}
    with pytest.raises(UserError, match=r"at most 100,000 tokens and 4,000,000 scores"):
        service.read_trace(json.dumps(whole).encode())


@pytest.mark.parametrize("odd", ["a\u2028b", "a\u2029b", "a\u0085b", "a\x1eb\x0cc"])
def test_words_that_look_like_the_end_of_a_line_lose_no_run(service, odd):
    """A finished run for a program, its snippet, its figure."""
    found = service.generate(0.5, request(prompt=f"Hello {odd} world"))
    assert found["new_tokens"] > 0


def test_a_trace_that_is_too_large_is_refused_unread(folder):
    with pytest.raises(UserError, match=r"at most 0 MB|0\.0 MB"):
        Service({}, limits=Limits(trace_bytes=10)).read_trace(b"x" * 100)


def test_turnstile_lets_in_by_order_of_arrival():
    gate, order = Turnstile(1, 10), []
    tickets = [object() for _ in range(6)]
    for ticket in tickets:
        gate.join(ticket)

    def go(at):
        while gate.wait(tickets[at], 0.01) is not None:
            time.sleep(0.001)
        order.append(at)
        gate.leave(tickets[at])

    threads = [threading.Thread(target=go, args=(at,)) for at in reversed(range(6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == list(range(6))


def test_one_user_gets_so_many_places_and_no_more():
    gate = Turnstile(1, 10, each=2)
    for user in ("a", "a", "b"):
        gate.join(object(), user)
    with pytest.raises(UserError, match="at most 2 at a time"):
        gate.join(object(), "a")
    gate.join(object(), "c")


def test_the_line_is_bounded_whatever_keeps_it_waiting():
    """Places, or memory: so many wait and no more."""
    for need in (0, 90):
        gate, first = Turnstile(4, 2, room=100), object()
        gate.join(first, need=90)
        assert gate.wait(first, 0.01) is None
        for _ in range(2 if need else 2 + 3):  # with memory to spare, three places are open besides
            gate.join(object(), need=need)
        with pytest.raises(UserError, match="queue is full"):
            gate.join(object(), need=need)


def test_memory_makes_wait_then_lets_in_and_what_never_fits_is_refused():
    held = [30]
    gate = Turnstile(5, 10, room=100, held=lambda: held[0], relieve=lambda short: held.clear() or held.append(0))
    first, second, third = object(), object(), object()
    gate.join(first, need=60)
    assert gate.wait(first, 0.01) is None
    assert held == [30], "it fitted beside what is held"
    gate.join(second, need=50)
    gate.join(third, need=1)
    assert gate.wait(second, 0.01) == 0
    assert gate.wait(third, 0.01) == 1, "nobody overtakes"
    assert gate.promised() == 60
    gate.leave(first)
    assert gate.wait(second, 0.01) is None
    gate.join(first, need=45)
    assert gate.wait(third, 0.01) is None
    assert gate.wait(first, 0.01) is None
    assert held == [0], "what could be given back was"
    with pytest.raises(UserError, match=r"at most 0\.0 MB"):
        gate.join(object(), need=101)


def test_a_lock_that_is_wanted_goes_round():
    """Three who take it again and again get it in turn."""
    lock, order, go = FairLock(), [], threading.Barrier(3)

    def work(name):
        go.wait()
        for _ in range(30):
            with lock:
                order.append(name)
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    middle = order[10:-10]
    assert all(len(set(middle[at : at + 3])) == 3 for at in range(len(middle) - 2))


def test_service_holds_no_state_on_its_module():
    assert not [name for name, value in vars(service_module).items() if isinstance(value, (list, dict, set))
                and not name.startswith("__")]


def test_pictures_come_at_a_frame_rate_and_the_last_holds_everything(folder):
    """A slow frame sends few messages; none of the tokens is lost."""
    run = Service({"tiny": folder}, limits=Limits(frame=60.0)).run("a", 0.5, request(max_new_tokens=40))
    tapes = [update.tape for update in run if update.tape]
    every = Service({"tiny": folder}, limits=Limits(frame=0.0)).run("a", 0.5, request(max_new_tokens=40))
    expected = [update.tape for update in every if update.tape][-1]
    assert len(tapes) <= 3, "the first, the end, and the end once more with its sentence"
    columns = [[line for line in tape.splitlines() if line.startswith('["c"')] for tape in (tapes[-1], expected)]
    assert columns[0] == columns[1]
