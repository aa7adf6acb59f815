"""Where prompts go: what is shared, copied, kept and forgotten, and that rows stay together."""

from typing import Any

import numpy as np
import pytest
from token_engine import VOCAB, TokenEngine, answer_to, ask, tokens_of

from headfold.runtime.backend import prefill_chunks
from headfold.runtime.scheduling.host_rows import HostRows, lazy_zeros
from headfold.runtime.scheduling.scheduler import Scheduler

A = list(range(60))
B = [9] * 40


def answered(scheduler: Scheduler, prompt: list[int], new: int = 4, reuse: bool = True) -> int:
    """The cached tokens of an answer that is right."""
    (answer,) = (answers := ask(scheduler, prompt, new=new, reuse=reuse)).generations(answers)
    assert answer.token_ids == answer_to(prompt, new)
    return answer.cached_tokens


@pytest.mark.parametrize("host", [True, False])
def test_a_prompt_starts_from_what_the_cache_has_of_it(host) -> None:
    engine = TokenEngine(host=host)
    scheduler = Scheduler(engine)
    assert answered(scheduler, A) == 0
    turn = A + answer_to(A, 4) + [7, 8]
    assert answered(scheduler, turn) == len(A) + 2  # an even number; the last token of an answer is never computed
    assert engine.calls[-4] == ("prefill", 0, 4)
    assert answered(scheduler, turn) == len(turn) - 2  # the last one's logits are wanted, and it is not computed alone
    assert answered(scheduler, A[:30] + B) == 30
    assert answered(scheduler, [50, *A]) == 0
    assert answered(scheduler, A, reuse=False) == 0


def test_a_beginning_that_is_shared_is_copied_and_what_had_it_stays() -> None:
    scheduler = Scheduler(TokenEngine(rows=2))
    assert answered(scheduler, A) == 0
    assert answered(scheduler, [*A[:20], *B]) == 20
    assert answered(scheduler, A) == len(A) - 2


class Rounding(TokenEngine):
    """Has a prompt's token that it computes alone come out otherwise, as kernels for one row round otherwise."""

    def prefill(self, cache: Any, row: int, ids: Any, all_logits: bool = False) -> Any:
        return super().prefill(cache, row, ids if len(ids) > 1 else (ids + 1) % VOCAB, all_logits)


@pytest.mark.parametrize("host", [True, False])
def test_no_token_of_a_prompt_is_computed_alone(host) -> None:
    """So an answer does not hang on what was cached, nor on what ran beside it."""
    engine = Rounding(rows=8, capacity=1200, host=host)
    scheduler, rng = Scheduler(engine), np.random.default_rng(1)
    for length in (2, 3, 60, 513, 1025):  # parts are of 512 tokens
        prompt = rng.integers(0, VOCAB, length).tolist()
        for _ in range(2):
            answered(scheduler, prompt)
        for more in (1, 2):
            answered(scheduler, prompt + answer_to(prompt, 4)[:3] + [5] * more)
    for lengths in ([129, 257], [127, 50, 126, 2], [130, 2, 3, 64, 62, 65], [125, 3, 3]):  # of 128, of several prompts
        prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
        assert tokens_of(ask(scheduler, *prompts)) == [answer_to(prompt, 8) for prompt in prompts]
    ids = rng.integers(0, VOCAB, 513)
    cache = engine.new_cache(1, 600)
    scheduler.compute(cache, ids)
    assert cache.tokens[0, 0, :513, 0].tolist() == ids.tolist()


class Pairs(TokenEngine):
    """Takes a prompt's tokens two by two: what is left of an odd number comes out otherwise, as of weights in blocks of 128."""

    def prefill(self, cache: Any, row: int, ids: Any, all_logits: bool = False) -> Any:
        odd = np.arange(len(ids)) == len(ids) // 2 * 2
        return super().prefill(cache, row, np.where(odd, (ids + 1) % VOCAB, ids), all_logits)


@pytest.mark.parametrize("length", [2, 3, 60, 61, 513, 514, 1025])
def test_the_same_tokens_are_computed_together_whatever_was_cached(length) -> None:
    warm, rng = Scheduler(Pairs(rows=8, capacity=1200)), np.random.default_rng(length)
    prompt = rng.integers(0, VOCAB, length).tolist()
    tokens_of(ask(warm, prompt, new=1, reuse=True))
    for cut in range(max(length - 4, 0), length + 1):
        for more in (2, 3):
            other = [*prompt[:cut], *rng.integers(0, VOCAB, more).tolist()]
            alone = tokens_of(ask(Scheduler(Pairs(capacity=1200)), other))
            assert tokens_of(ask(warm, other, reuse=True)) == alone


def test_a_prompt_is_read_in_parts_that_are_even() -> None:
    for length in range(1, 70):
        for size in range(1, 12):
            cache = TokenEngine(capacity=100).new_cache(1, 100)
            parts = [step.end - step.begin for step in prefill_chunks(cache, 0, np.arange(length), size)]
            assert (sum(parts), max(parts) <= size, int(cache.lengths[0])) == (length, True, length)
            assert size == 1 or all(part % 2 == 0 for part in parts[:-1])
            assert size < 4 or length == 1 or parts[-1] > 1


def test_one_slot_is_the_place_for_everything() -> None:
    scheduler = Scheduler(TokenEngine(rows=1))
    assert answered(scheduler, A) == 0
    assert answered(scheduler, [*A[:20], *B]) == 20
    assert answered(scheduler, A) == 20


def test_prompts_that_come_together_compute_what_they_share_once() -> None:
    engine = TokenEngine(rows=4, capacity=400)
    stem = np.random.default_rng(0).integers(0, 101, 300).tolist()
    prompts = [[*stem, i, i] for i in range(4)]
    answers = ask(Scheduler(engine), *prompts, new=3, reuse=True)
    generations = answers.generations(answers)
    assert [one.token_ids for one in generations] == [answer_to(prompt, 3) for prompt in prompts]
    assert [one.cached_tokens for one in generations] == [0, 300, 300, 300]
    assert sum(call[2] for call in engine.calls if call[0] == "prefill") == 308


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    scheduler = Scheduler(TokenEngine(rows=4), keep_bytes=8 * 120)  # of 8 bytes per token
    assert answered(scheduler, A) == 0
    assert answered(scheduler, B) == 0
    assert answered(scheduler, A) == 58  # 63 + 43 tokens are kept
    assert answered(scheduler, [80] * 30) == 0  # 33 more: B goes
    assert answered(scheduler, B) == 0
    scheduler = Scheduler(TokenEngine(), keep_bytes=0)
    assert [answered(scheduler, A) for _ in range(2)] == [0, 0]


def test_the_token_that_a_full_row_loses_is_nobodys() -> None:
    """A full row is kept between two that run, and runs along: its last token is overwritten."""
    engine = TokenEngine(rows=3, capacity=63, host=False)  # nothing can move
    scheduler = Scheduler(engine)
    full = list(range(62))
    engine.hold()
    first, middle, last = (
        ask(scheduler, [1], new=40),
        ask(scheduler, full, new=2, reuse=True),
        ask(scheduler, [2], new=40),
    )
    engine.turn.release(1000)
    for answers, prompt, new in ((first, [1], 40), (middle, full, 2), (last, [2], 40)):
        assert tokens_of(answers) == [answer_to(prompt, new)]
    assert ("decode", 0, 3) in engine.calls[-30:]
    assert answered(scheduler, [*full, answer_to(full, 1)[0]], new=1) == 60  # of 61


def test_rows_move_together_when_neighbours_leave() -> None:
    engine = TokenEngine(rows=4, capacity=400)
    scheduler = Scheduler(engine)
    engine.hold()
    first = ask(scheduler, [1], new=200)
    engine.waits.wait()
    short = ask(scheduler, [2], [3], new=4)
    last = ask(scheduler, [4], new=200)
    engine.turn.release(1000)
    assert tokens_of(first) == [answer_to([1], 200)]
    assert tokens_of(short) == [answer_to([2], 4), answer_to([3], 4)]
    assert tokens_of(last) == [answer_to([4], 200)]
    widths = [end - first for kind, first, end in engine.calls if kind == "decode"]
    assert max(widths) == 4
    assert widths.count(2) > 150
    assert widths[-1] == 1


def test_memory_is_taken_when_it_is_written_and_can_be_given_back() -> None:
    array = lazy_zeros((3, 2, 4096, 1), np.dtype(np.float32))
    rows = HostRows([array])
    array[:] = np.arange(3)[:, None, None, None] + 1
    rows.give_back(1)
    assert array[:, 0, 0, 0].tolist() == [1, 0, 3]
    assert array[:, 1, -1, 0].tolist() == [1, 0, 3]
    rows.copy(0, 1, 10)
    assert (array[1, :, :10] == 1).all()
    assert not array[1, :, 10:].any()
    rows.swap(1, 2, 12)
    assert (array[1, :, :12] == 3).all()
    assert (array[2, :, :10] == 1).all()
    assert not array[2, :, 10:12].any()
    assert (array[2, :, 12:] == 3).all()
