"""Who runs when: turns, joining and leaving, fairness, bounds, ends of all kinds. On an engine whose answers show any mix-up."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from token_engine import TokenEngine, answer_to, ask, tokens_of

from headfold.runtime import BusyError, CapacityError, DeadlineError, InputError
from headfold.runtime.scheduling.scheduler import Scheduler

LONG = [5] * 380


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("keep_bytes", [0, 3000, 1 << 30])
def test_whatever_runs_beside_them_answers_are_those_of_lone_runs(host, keep_bytes) -> None:
    """Prompts with common beginnings, from several threads, some of which let go: joins, holes, moves, copies, full rows."""
    engine = TokenEngine(rows=4, capacity=160, host=host)
    scheduler = Scheduler(engine, keep_bytes=keep_bytes)
    stems = [np.random.default_rng(stem).integers(0, 101, 150) for stem in range(3)]

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            prompts = [
                np.append(stems[rng.integers(3)][: rng.integers(1, 140)], rng.integers(0, 101, rng.integers(1, 5)))
                for _ in range(rng.integers(1, 4))
            ]
            new = int(rng.integers(1, 160 - max(map(len, prompts)) + 1))
            answers = ask(scheduler, *prompts, new=new, reuse=bool(rng.integers(3)))
            if rng.integers(4) == 0:
                next(answers)
                answers.close()
            else:
                assert tokens_of(answers) == [answer_to(prompt, new) for prompt in prompts]

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(client, range(6)))
    until(lambda: scheduler._thread is None)
    status = scheduler.status()
    assert (status.waiting, status.live) == (0, 0)
    assert (status.cached_tokens > 0) == (keep_bytes > 0 or host)  # what runs can be copied from
    widths = [end - first for kind, first, end in engine.calls if kind == "decode"]
    assert max(widths) > 1


def test_a_long_prompt_stops_the_others_for_a_part_of_it() -> None:
    engine = TokenEngine()
    scheduler = Scheduler(engine)
    engine.hold()
    first = ask(scheduler, [1, 2], new=30)
    engine.waits.wait()
    second = ask(scheduler, LONG, new=2)
    engine.turn.release(1000)
    assert tokens_of(first) == [answer_to([1, 2], 30)]
    assert tokens_of(second) == [answer_to(LONG, 2)]
    parts = [i for i, call in enumerate(engine.calls) if call[0] == "prefill" and call[1:] != (0, 2)]
    assert [engine.calls[i][2] for i in parts] == [128, 128, 124]
    assert [engine.calls[i + 1][0] for i in parts] == ["decode"] * 3


def test_a_short_prompt_overtakes_a_long_one() -> None:
    engine = TokenEngine(capacity=4000)
    scheduler = Scheduler(engine)
    engine.hold()
    long = ask(scheduler, [5] * 3000, new=1)
    engine.waits.wait()
    short = ask(scheduler, [1, 2], new=1)
    engine.turn.release(1000)
    tokens_of(short), tokens_of(long)
    done = engine.calls.index(("prefill", 1, 2))
    assert sum(call[0] == "prefill" for call in engine.calls[:done]) <= 2


def test_one_prompt_alone_is_one_part_and_one_row_wide() -> None:
    engine = TokenEngine(capacity=600)
    assert tokens_of(ask(Scheduler(engine), [3] * 500, new=4)) == [answer_to([3] * 500, 4)]
    assert engine.calls == [("prefill", 0, 500), *[("decode", 0, 1)] * 3]


def test_calls_take_turns_so_a_long_list_stops_nobody() -> None:
    engine = TokenEngine(rows=1)
    scheduler, seen = Scheduler(engine), []
    prefill = engine.prefill
    engine.prefill = lambda cache, row, ids: seen.append(int(ids[0])) or prefill(cache, row, ids)
    engine.hold()
    many = ask(scheduler, *([i] for i in range(20)), new=1)
    engine.waits.wait()
    one = ask(scheduler, [50], new=1)
    engine.turn.release(1000)
    tokens_of(one), tokens_of(many)
    assert seen.index(50) <= 2
    assert [i for i in seen if i != 50] == list(range(20))


def test_when_the_queue_is_full_new_calls_are_refused_and_nothing_else_happens() -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine, waiting=2)
    engine.hold()
    running = ask(scheduler, [1])
    engine.waits.wait()
    waiting = ask(scheduler, [2], [3])
    with pytest.raises(BusyError, match="2 prompts wait already"):
        ask(scheduler, [4])
    assert scheduler.status().waiting == 2
    engine.turn.release(1000)
    assert tokens_of(running) == [answer_to([1], 8)]
    assert tokens_of(waiting) == [answer_to([2], 8), answer_to([3], 8)]


@pytest.mark.parametrize("let_go", [lambda answers: answers.close(), lambda answers: answers.__exit__()])
def test_letting_go_frees_the_slot_and_the_place_in_the_queue(let_go) -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine)
    engine.hold()
    running, waiting = ask(scheduler, [1], new=300), ask(scheduler, [2], new=300)
    engine.waits.wait()
    let_go(running), let_go(waiting)
    engine.turn.release(3)
    until(lambda: scheduler._thread is None)
    assert len(engine.calls) <= 2  # the one that was under way, and at most the one after it
    assert list(running) == []


def test_an_iterator_that_is_dropped_cancels() -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine)
    engine.hold()
    answers = ask(scheduler, [1], new=300)
    engine.waits.wait()
    del answers
    engine.turn.release(3)
    until(lambda: scheduler._thread is None)


def test_deadlines_of_running_and_of_waiting_prompts() -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine)
    engine.hold()
    soon = time.monotonic() + 0.02
    running, waiting = ask(scheduler, [1], new=300, deadline=soon), ask(scheduler, [2], deadline=soon)
    patient = ask(scheduler, [3])
    until(lambda: time.monotonic() > soon)
    engine.turn.release(1000)
    with pytest.raises(DeadlineError, match=r"answer 0 had \d of at most 300 tokens"):
        list(running)
    with pytest.raises(DeadlineError, match="had 0 of at most 8 tokens"):
        list(waiting)
    assert tokens_of(patient) == [answer_to([3], 8)]


def test_an_engine_that_breaks_ends_what_it_was_at_and_is_tried_again() -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine)
    engine.hold()
    engine.broken = OSError("it broke")
    running, waiting = ask(scheduler, [1], [9]), ask(scheduler, [2])
    engine.waits.wait()
    engine.turn.release()
    with pytest.raises(OSError, match="it broke"):
        list(running)
    engine.broken = None
    engine.turn.release(1000)
    assert tokens_of(waiting) == [answer_to([2], 8)]


def test_without_memory_for_all_slots_there_are_fewer() -> None:
    engine = TokenEngine(rows=4)
    new_cache = engine.new_cache

    def short_of_memory(batch: int, capacity: int):
        if batch > 1:
            raise CapacityError("no memory")
        return new_cache(batch, capacity)

    engine.new_cache = short_of_memory
    assert tokens_of(ask(Scheduler(engine), [1], [2])) == [answer_to([1], 8), answer_to([2], 8)]
    engine.new_cache = lambda *_: (_ for _ in ()).throw(CapacityError("none at all"))
    with pytest.raises(CapacityError, match="none at all"):
        list(ask(Scheduler(engine), [1]))


def test_closing_ends_everything_and_nothing_begins_after_it() -> None:
    engine = TokenEngine(rows=1)
    scheduler = Scheduler(engine)
    engine.hold()
    running, waiting = ask(scheduler, [1], new=300), ask(scheduler, [2])
    engine.waits.wait()
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    until(lambda: scheduler._closed)
    engine.turn.release(5)
    closing.join(10)
    for answers in (running, waiting):
        with pytest.raises(InputError, match="closed before the answer was complete"):
            list(answers)
    scheduler.close()
    with pytest.raises(InputError, match="the model is closed"):
        ask(scheduler, [1])
    with pytest.raises(InputError, match="the model is closed"):
        scheduler.run(lambda: 1)


def test_other_work_has_its_turn_between_steps() -> None:
    engine = TokenEngine()
    scheduler = Scheduler(engine)
    assert scheduler.run(lambda: threading.current_thread().name) == "headfold-scheduler"
    with pytest.raises(ZeroDivisionError):
        scheduler.run(lambda: 1 // 0)
    engine.hold()
    running = ask(scheduler, [1], new=100)
    engine.waits.wait()
    with ThreadPoolExecutor(1) as other:
        job = other.submit(scheduler.run, lambda: len(engine.calls))
        until(lambda: scheduler._jobs)
        engine.turn.release(1000)
        assert job.result() < 100
    assert tokens_of(running) == [answer_to([1], 100)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_is_refused() -> None:
    scheduler = Scheduler(TokenEngine())
    tokens_of(ask(scheduler, [1]))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ask(scheduler, [1])
        except InputError as error:
            os.write(writing, str(error).encode())
        finally:
            scheduler.close()
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        assert "loaded before this process was forked" in pipe.read()


def test_the_thread_and_the_cache_are_there_only_while_there_is_work() -> None:
    scheduler = Scheduler(TokenEngine())
    assert scheduler._thread is None
    tokens_of(ask(scheduler, [1]))
    until(lambda: scheduler._thread is None)
    assert scheduler._slots is None
    tokens_of(ask(scheduler, [1], reuse=True))
    until(lambda: scheduler._thread is None)
    assert scheduler._slots is not None


@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": 1.5}, {"waiting": "2"}, {"keep_bytes": -1}])
def test_numbers_that_make_no_scheduler(options) -> None:
    with pytest.raises(InputError, match="or more"):
        Scheduler(TokenEngine(), **options)
