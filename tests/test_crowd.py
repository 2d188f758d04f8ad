"""Many users of one process: nobody gets another's tokens, nobody is forgotten, nothing piles up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import warm
from talkers import columns, talker

from app.errors import UserError
from app.service import Limits, Request, Service, desk
from app.tape import Piece, Tape, records
from benchmarks import crowd
from modification import generate
from modification.executor import executor_of
from modification.measure.memory import trim

USERS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model"), chat=True, context=512)


def request(user: int, **changes) -> Request:
    chosen = random.Random(user)
    return Request(**{
        "prompt": f"User {user} says " + "word " * chosen.randint(1, 30), "model": "tiny", "seed": user,
        "max_new_tokens": chosen.randint(5, 40), "temperature": chosen.choice([0.0, 0.8]), **changes,
    })


def threshold(user: int) -> float:
    return random.Random(user + 1000).choice([0.0, 0.3, 0.5, 0.8, 1.0])


def whole(service: Service, user: int, told: list[int] | None = None) -> list[list]:
    """A user's run to its end."""
    tape = ""
    for update in service.run(f"user {user}", threshold(user), request(user)):
        tape = update.tape or tape
        if update.waiting is not None and told is not None:
            told.append(update.waiting)
    return columns(tape)


def replayed(service: Service, user: int, got: list[list]) -> list[list]:
    """A run by itself, in which p moves as it did in ``got``: its columns."""
    loaded, asked = service.open("tiny"), request(user)
    prompt = [column[6] for column in got if len(column) == 7]  # the others have a log-probability
    moves = iter([column[2] for column in got[len(prompt) - 1 :]])
    tape = Tape(loaded.shape, "", loaded.anchors)
    for step in generate(
        loaded.model, prompt, p=lambda: next(moves), max_new_tokens=len(got) - len(prompt), stop=(), alternatives=5,
        **asked.sampling(),
    ):
        tape.add(step, [Piece("")] * len(step.tokens))
    return columns(tape.text)


def test_fifty_users_at_once_get_what_each_gets_alone(folder, monkeypatch):
    """Some leave, some move p, all share one model; every token, score and decision is as if alone."""
    monkeypatch.setattr(desk, "_BEAT", 0.005)  # a fast machine has let all in before the usual one
    service = Service({"tiny": folder}, limits=Limits(running=8, waiting=USERS, frame=0.0))
    alone = {user: whole(service, user) for user in range(USERS)}
    ready, told = threading.Barrier(USERS), list[int]()

    def go(user):
        ready.wait()
        if user % 10 == 7:  # leaves in the middle
            with contextlib.closing(service.run(f"user {user}", 0.5, request(user, max_new_tokens=400))) as run:
                next(update for update in run if update.tape)
            return None
        if user % 10 == 3:  # moves p all the time
            for update in service.run(f"user {user}", 0.5, request(user)):
                service.set_p(f"user {user}", round(random.random(), 3))
                tape = update.tape
            return columns(tape)
        return whole(service, user, told)

    with ThreadPoolExecutor(USERS) as pool:
        found = dict(enumerate(pool.map(go, range(USERS))))
    moved = set[float]()
    for user, got in found.items():
        if user % 10 == 3:
            moved |= {column[2] for column in got}
            decided = [[column[at] for at in (2, 3, 4, 6)] for column in got]
            assert decided == [[column[at] for at in (2, 3, 4, 6)] for column in replayed(service, user, got)]
        elif user % 10 != 7:
            assert got == alone[user], f"user {user}"
    assert len(moved) > 10, "p did move"
    assert max(told) > 0, "places in the queue were told"
    assert service.desk.turnstile.count() == (0, 0)
    assert service.desk.turnstile.promised() == 0


@pytest.mark.parametrize("budget", [1, 2])
def test_the_shortest_answers_end_beside_long_ones(folder, budget):
    """A run that ends with its first token is whole, and takes nobody with it."""
    service = Service({"tiny": folder}, limits=Limits(frame=0.0))
    wanted = request(1, max_new_tokens=300, temperature=0.0)
    *_, alone = service.run("long", 0.3, wanted)
    with contextlib.closing(service.run("long", 0.3, wanted)) as long:
        next(update for update in long if update.tape)
        for user in range(5):
            *_, last = service.run(f"short {user}", 0.5, request(user, max_new_tokens=budget))
            assert sum(column[5] == "n" for column in columns(last.tape)) == budget
        *_, last = long
        assert columns(last.tape) == columns(alone.tape)


def test_nothing_of_a_cache_is_left(folder, monkeypatch):
    """All caches of runs that ended, were left, or failed are empty."""
    service = Service({"tiny": folder}, limits=Limits(frame=0.0))
    model, made = service.open("tiny").model, []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda: made.append(new_cache()) or made[-1], raising=False)
    for user in range(20):
        with contextlib.closing(service.run(f"user {user}", 0.3, request(user))) as run:
            for _ in zip(run, range(1 + user % 4), strict=False):
                pass
    until = time.monotonic() + 10
    while any(cache.nbytes().allocated for cache in made) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(made) == 20
    assert not any(cache.nbytes().allocated for cache in made)


def test_kept_caches_count_while_their_next_message_waits(folder):
    """A chat in line holds what it held: as kept, until it has its place."""
    service = Service({"tiny": folder}, limits=Limits(running=1, frame=0.0))
    for _ in service.talks.chat("talker", ("tiny", "tiny"), 0.5, request(1)):
        pass
    held = service.talks.store.held()
    assert held > 0
    with contextlib.closing(service.run("long", 0.3, request(1, max_new_tokens=400))) as long:
        next(update for update in long if update.tape)
        with contextlib.closing(service.talks.chat("talker", ("tiny", "tiny"), 0.5, request(2))) as waiting:
            next(update for update in waiting if update.waiting is not None)
            assert service.talks.store.held() == held


@pytest.mark.parametrize("others", [0, 3])
def test_a_chat_goes_on_where_memory_is_short(folder, others):
    """What its own caches hold is within what its next message needs; what other chats hold is emptied, those in line
    too."""
    probe = Service({"tiny": folder}, limits=Limits(frame=0.0))
    wanted = request(1, max_new_tokens=20)
    list(probe.talks.chat("one", ("tiny", "tiny"), 0.3, wanted))
    conversation, model = probe.talks.store.of("one"), probe.open("tiny")
    need = conversation.need((model, model), wanted.prompt, 20)
    service = Service({"tiny": folder}, limits=Limits(running=8, frame=0.0, cache_bytes=int(1.1 * need)))
    names = [f"chat {at}" for at in range(1 + others)]
    for _ in range(2):
        with ThreadPoolExecutor(len(names)) as pool:
            chats = [pool.submit(lambda name: list(service.talks.chat(name, ("tiny", "tiny"), 0.3, wanted)), name)
                     for name in names]
            assert all(chat.result(timeout=60)[-1].tape for chat in chats)
    assert all(len(service.talks.turns(name)) == 2 for name in names)
    assert service.desk.turnstile.count() == (0, 0)
    assert service.talks.store.held() <= service.limits.cache_bytes


def test_who_leaves_a_sweep_keeps_its_place_until_the_work_has_noticed(folder):
    """So that leaving and coming again does not pile work up."""
    service = Service({"tiny": folder}, limits=Limits(running=1, frame=0.0))
    text = "Once upon a time there was a fox. " * 200
    run = service.lab.sweep("tiny", None, text, [0.1 * at for at in range(11)], 0.02, "someone")
    next(run)
    run.close()
    until = time.monotonic() + 20
    while service.desk.turnstile.count() != (0, 0) and time.monotonic() < until:
        time.sleep(0.02)
    assert service.desk.turnstile.count() == (0, 0)
    assert service.library.open("tiny").users == 0


def test_requests_beyond_the_queue_are_refused_and_none_is_lost(folder):
    """Each either ends or is told why not."""
    service = Service({"tiny": folder}, limits=Limits(running=2, waiting=5, frame=0.0))
    ready, outcomes = threading.Barrier(30), []

    def go(user):
        ready.wait()
        try:
            outcomes.append(len(whole(service, user)) > 0)
        except UserError as error:
            outcomes.append(str(error))

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(go, range(30)))
    assert len(outcomes) == 30
    assert outcomes.count(True) >= 7
    assert all(one is True or "queue is full" in one for one in outcomes)


def test_what_was_allocated_is_within_what_was_promised(folder):
    """The estimate that lets a request in holds for what its cache takes, to the byte and never below."""
    service = Service({"tiny": folder}, limits=Limits(frame=0.0))
    loaded = service.open("tiny")
    caches = []
    for user in range(12):
        tape = ""
        for update in service.run("one", 0.0 if user % 2 else threshold(user), request(user)):
            tape = update.tape or tape
        figures = [record for record in records(tape) if record[0] == "f"][-1]
        allocated, tokens = figures[5], len(columns(tape))
        assert 0 < allocated <= loaded.cache_bytes(tokens)
        caches.append(allocated / loaded.cache_bytes(tokens))
    assert max(caches) > 0.9, "and it is no wild guess"


def test_all_sessions_together_take_no_more_than_was_promised(folder, monkeypatch):
    """While many run, are in line and leave: what all caches have allocated, looked at at every token."""
    service = Service({"tiny": folder}, limits=Limits(running=6, waiting=USERS, frame=0.0))
    model, caches, shares = service.open("tiny").model, [], []
    make, decode = model.new_cache, executor_of(model).decode

    def watched(*given):
        done = decode(*given)
        taken = sum(cache.nbytes().allocated for cache in list(caches))
        shares.append(taken / service.desk.turnstile.promised())
        return done

    monkeypatch.setattr(model, "new_cache", lambda: caches.append(make()) or caches[-1], raising=False)
    monkeypatch.setattr(executor_of(model), "decode", watched)

    def go(user):
        with contextlib.closing(service.run(f"user {user}", 0.2 * (user % 3), request(user))) as run:
            for _ in zip(run, range(5 if user % 4 == 1 else 1000), strict=False):
                pass

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(go, range(24)))
    assert len(shares) > 50
    assert 0.5 < max(shares) <= 1.0


def test_memory_bounds_who_may_run(folder):
    """A request that memory would never do for is refused at once; the message has the figures."""
    service = Service({"tiny": folder}, limits=Limits(frame=0.0, cache_bytes=50_000))
    with pytest.raises(UserError, match=r"may need .* MB for keys and values .* at most 0\.1 MB"):
        list(service.run("a", 0.5, request(1, max_new_tokens=400)))
    assert whole(service, 1)


def resident() -> int:
    """Bytes of this process in memory, what was freed given back."""
    gc.collect()
    trim()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_memory_is_flat_after_500_requests(folder):
    """Within 5% of what it was after 50; runs that were left and that were not, and chats."""
    service = Service({"tiny": folder}, limits=Limits(running=8, waiting=200, frame=0.0, chats=4))

    def go(user):
        if user % 5 == 1:
            with contextlib.closing(service.run(f"user {user}", 0.5, request(user))) as run:
                next(run)
        elif user % 5 == 2:
            wanted = request(user, max_new_tokens=5)
            for _ in service.talks.chat(f"user {user % 20}", ("tiny", "tiny"), 0.5, wanted, turns=0):
                pass
        else:
            whole(service, user)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(go, range(50)))
        before = resident()
        list(pool.map(go, range(50, 500)))
    after = resident()
    assert after < 1.05 * before, f"{before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"


def promised(url: str) -> float:
    """Bytes of keys and values that the app holds for runs, as it tells Prometheus."""
    told = httpx.get(f"{url}/metrics").text
    return float(re.search(r"^mod_kv_promised_bytes (\S+)$", told, re.M).group(1))


def test_fifty_pages_over_http_get_what_each_gets_alone(folder):
    """The app as ``python app.py`` starts it; every page opens, presses Generate, and some move p, stop or leave."""
    with warm.app("--model", str(folder)) as url:
        figures, got = asyncio.run(crowd.crowd(url, USERS, 60, 30, lambda: 0))
        until = time.monotonic() + 10  # those who left are taken out within a step
        while (held := promised(url)) and time.monotonic() < until:
            time.sleep(0.05)
    assert held == 0, "all caches are freed"
    service = Service({"alone": folder})
    assert figures["outcomes"] == {"done": 48, "stopped": 6, "left": 6}
    assert len(got) == 42
    for at, given in got.items():
        assert given == crowd.alone(service, "alone", at, 30), f"request {at}"
