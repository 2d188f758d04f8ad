"""Chats: two sides, caches that live between turns, turns that can be taken back."""

import gc
import json
import threading
import time

import pytest
from talkers import talker

from app.errors import UserError
from app.service import Limits, Request, Service, answers
from app.talk import ChatTape


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return {
        "tiny-MoD": talker(root / "mod", chat=True, context=512),
        "tiny": talker(root / "dense", chat=True, context=512, dense=True),
    }


@pytest.fixture
def service(folders):
    return Service(folders, limits=Limits(running=1, frame=0.0, chats=2))


PAIR = ("tiny", "tiny-MoD")


def request(message, **changes):
    return Request(**{"prompt": message, "model": "tiny-MoD", "max_new_tokens": 12, "temperature": 1.0, "seed": 3,
                      **changes})


def talk(service, *messages, session="one", p=0.5, **options):
    """Send messages one after another; the conversation's record."""
    for message in messages:
        for _ in service.talks.chat(session, PAIR, p, request(message), **options):
            pass
    return service.talks.record(session)


def records(tape):
    return [json.loads(line) for line in tape.split("\n") if line]


def test_the_left_side_runs_everything_and_the_right_side_routes(service):
    turn = talk(service, "Hello")[0]
    assert turn["figures"][0]["load"] == 1.0
    assert turn["figures"][1]["load"] < 1.0
    assert turn["figures"][1]["kv"][0] < turn["figures"][0]["kv"][0]


def test_at_p_zero_both_sides_say_the_same(service):
    """The MoD model has the dense one's weights: the same seed gives the same answer."""
    turn = talk(service, "Hello", p=0.0)[0]
    assert turn["answers"][0] == turn["answers"][1]


def test_the_next_turn_prefills_only_what_is_new(service):
    first, second = talk(service, "Hello there", "And more")
    added = len("</s>[user]And more</s>[assistant]") - 3 - 3  # </s> is one token of four letters
    for side in (0, 1):
        assert first["figures"][side]["prefilled"] > second["figures"][side]["prefilled"]
        assert second["figures"][side]["prefilled"] <= added


def test_a_chat_keeps_no_model_that_was_let_go(service):
    """Its next message loads the model again, and the chat goes on."""
    talk(service, "Hello")
    held = [side.held for side in service.talks.store.of("one").threads]
    assert all(ref() is not None for ref in held)
    service.library._let_go()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    talk(service, "More")
    assert all(side.held() is not None for side in service.talks.store.of("one").threads)


def test_a_cached_conversation_says_what_a_fresh_one_with_the_same_tokens_says(folders, service):
    """The second answer equals that of one run over the whole conversation's tokens."""
    from modification import generate, load

    talk(service, "Hello", "More")
    thread = service.talks.store.of("one").threads[1]
    ids = thread.ids[: thread.ends[-2][1]]  # all that was there before the last answer
    answer = thread.ids[len(ids) :]
    model, _ = load(folders["tiny-MoD"])
    fresh = [s.token for s in generate(model, ids, p=0.5, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)]
    assert fresh[1:] == answer


def test_regenerating_with_the_same_seed_says_the_same(service):
    before = talk(service, "Hello", "More")
    after = talk(service, "More", turns=1)
    assert [turn["answers"] for turn in before] == [turn["answers"] for turn in after]


def test_a_turn_taken_back_is_gone_and_what_was_before_stays(service):
    talk(service, "Hello", "More")
    service.talks.cut("one", 1)
    assert service.talks.turns("one") == ["Hello"]
    assert [r[1] for r in records(service.talks.tape("one")) if r[0] == "u"] == ["Hello"]
    assert len(talk(service, "Other")) == 2


def test_an_answer_left_in_the_middle_stays_as_far_as_it_came(service):
    run = service.talks.chat("one", PAIR, 0.5, request("Hello", max_new_tokens=100))
    for _ in range(12):
        next(run)
    run.close()
    assert any(service.talks.record("one")[0]["answers"])
    ends = [record for record in records(service.talks.tape("one")) if record[0] == "e"]
    assert [record[2] for record in ends] == ["Stopped."] * 2
    assert len(talk(service, "Go on")) == 2


def test_p_moved_in_mid_answer_moves_the_right_side_alone(service, monkeypatch):
    allowed, next_step = threading.Semaphore(20), answers.next_step
    monkeypatch.setattr(answers, "next_step", lambda steps, lock: allowed.acquire() and next_step(steps, lock))
    loads = []
    for update in service.talks.chat("one", PAIR, 0.0, request("Hello", max_new_tokens=60)):
        loads += [r[2]["load"] for r in records(update.tape or "") if r[0] == "f" and r[1] == 1][-1:]
        if loads and allowed._value == 0:
            service.set_p("one/chat", 1.0)
            allowed.release(1000)
    figures = service.talks.record("one")[0]["figures"]
    assert loads[0] == 1.0
    assert figures[1]["load"] < 1.0 == figures[0]["load"]


def test_nobody_else_answers_while_an_answer_is_made(service, monkeypatch):
    """A second message, a turn taken back: each is told to wait, and the answer goes on."""
    monkeypatch.setattr("app.service.talks._PATIENCE", 0.05)
    service = Service(service.library.listed, limits=Limits(running=2, frame=0.0))
    allowed, next_step = threading.Semaphore(10), answers.next_step
    monkeypatch.setattr(answers, "next_step", lambda steps, lock: allowed.acquire() and next_step(steps, lock))
    run = service.talks.chat("one", PAIR, 0.5, request("Hello"))
    next(update for update in run if update.tape)
    talks = service.talks
    for other in (lambda: list(talks.chat("one", PAIR, 0.5, request("Me too"))), lambda: talks.cut("one", 0)):
        with pytest.raises(UserError, match="still being made"):
            other()
    service.close("one")
    assert service.talks.turns("one") == []
    allowed.release(1000)
    last = [update.tape for update in run][-1]
    assert [record[0] for record in records(last)].count("e") == 2


def test_closing_a_session_frees_both_caches(service):
    talk(service, "Hello")
    caches = [thread.cache for thread in service.talks.store.of("one").threads]
    assert all(cache.nbytes().stored for cache in caches)
    service.close("one")
    assert not any(cache.nbytes().allocated for cache in caches)


def test_the_least_recent_conversation_makes_room(service):
    """Two keep their caches here; what was said in the third stays, and it goes on."""
    for session in ("a", "b", "c"):
        talk(service, "Hello", session=session)
    assert [service.talks.store.of(session).allocated() > 0 for session in "abc"] == [False, True, True]
    assert [turn["message"] for turn in talk(service, "And then?", session="a")] == ["Hello", "And then?"]
    assert [service.talks.store.of(session).allocated() > 0 for session in "abc"] == [True, False, True]


def test_a_conversation_that_waits_is_not_idle(service):
    """However long its answer takes."""
    talk(service, "Hello")
    later = time.monotonic() + service.limits.idle + 1
    with service.talks.store.of("one").alone():
        service.talks.store.close_idle(later)
        assert service.talks.turns("one") == ["Hello"]
    service.talks.store.close_idle(later + service.limits.idle)
    assert service.talks.turns("one") == []


def test_blind_sides_are_dealt_by_lot_and_the_tape_says_who_is_who(service, monkeypatch):
    for lot in (0, 1):
        monkeypatch.setattr("app.service.door.secrets.randbelow", lambda count, lot=lot: lot)
        turn = talk(service, "Hello", session=f"lot {lot}", blind=True)[0]
        head = records(service.talks.tape(f"lot {lot}"))[0][1]
        assert head["blind"]
        dense = next(at for at, name in enumerate(head["names"]) if "every layer" in name)
        assert dense == lot
        assert turn["figures"][dense]["load"] == 1.0


@pytest.mark.parametrize(("message", "sentence"), [
    ("  ", "prompt is empty"), ("x" * 300_000, "300,000 characters"), ("long " * 200, "context of 512"),
])
def test_a_bad_message_is_a_sentence_and_costs_no_turn(service, message, sentence):
    talk(service, "Hello")
    with pytest.raises(UserError, match=sentence):
        talk(service, message)
    assert service.talks.turns("one") == ["Hello"]
    assert len(talk(service, "Go on")) == 2


def test_two_sessions_do_not_hear_each_other(service):
    alone = talk(service, "Hello", session="a")
    talk(service, "Something else", session="b")
    assert service.talks.record("a") == alone


# The tape


def test_the_parting_is_noted_once_at_its_character():
    tape = ChatTape(("a", "b"))
    tape.ask("Hi")
    for side, text in ((0, "The fox"), (1, "The "), (1, "fog"), (0, " ran"), (1, " fell")):
        tape.say(side, text)
    assert [record for record in records(tape.text) if record[0] == "d"] == [["d", 6]]


def test_the_tape_only_grows_until_a_turn_is_taken_back():
    tape = ChatTape(("a", "b"))
    seen = tape.text
    for at in range(4):
        tape.ask(f"{at}")
        tape.say(at % 2, "word ")
        assert tape.text.startswith(seen)
        seen = tape.text
    tape.cut(1)
    assert [record[1] for record in records(tape.text) if record[0] == "u"] == ["0"]
    assert not tape.text.startswith(seen[:40])


def test_hostile_words_stay_one_json_line():
    tape = ChatTape(("a", "b"))
    tape.ask('</script><img src=x onerror=alert(1)>\n["e",0,"x"]')
    tape.say(0, '"]\n["d",0]')
    assert [record[0] for record in records(tape.text)] == ["h", "u", "t"]


def test_a_chats_tokens_are_counted_and_its_place_is_kept_until_its_work_has_ended(service, monkeypatch):
    """Left in the middle of a step, it holds place and caches until that step is over."""
    turn = talk(service, "Hello")[0]
    made = sum(figures["tokens"] for figures in turn["figures"])
    assert f"mod_tokens_total {float(made)}" in service.metrics().decode()
    inside, go_on, next_step = threading.Event(), threading.Event(), answers.next_step

    def slow(steps, lock):
        inside.set()
        go_on.wait(30)
        return next_step(steps, lock)

    monkeypatch.setattr(answers, "next_step", slow)
    run = service.talks.chat("two", PAIR, 0.5, request("Hello"))
    reader = threading.Thread(target=lambda: next(run))
    reader.start()
    assert inside.wait(30)
    monkeypatch.setattr(answers, "next_step", next_step)
    reader.join(30)
    run.close()
    assert service.desk.turnstile.count() == (1, 0)
    go_on.set()
    until = time.monotonic() + 20
    while service.desk.turnstile.count() != (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    assert service.desk.turnstile.count() == (0, 0)
    assert talk(service, "Again", session="two")[-1]["message"] == "Again"
