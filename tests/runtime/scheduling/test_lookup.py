"""Guessed tokens change no answer and no distribution; they save steps where text repeats itself, and stop where it does not."""

import itertools
import queue
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2
from token_engine import VOCAB, TokenEngine, answer_to, ask, next_token, tokens_of

from headfold.runtime import InputError, load
from headfold.runtime.choosing.sampling import Sampler, SamplingParameters
from headfold.runtime.scheduling.answers import Answers, deliver_here
from headfold.runtime.scheduling.lookup import Lookup, Timing
from headfold.runtime.scheduling.request import Request
from headfold.runtime.scheduling.scheduler import Scheduler


class Parrot(TokenEngine):
    """Repeats what came eight tokens before, but for a token that all of the row decides, now and then."""

    @staticmethod
    def following(context: Any) -> int:
        free = next_token(context)
        return free if free % 9 == 0 or len(context) < 8 else int(context[-8])

    def _logits(self, cache: Any, row: int) -> Any:
        logits = np.zeros(VOCAB, np.float32)
        context = cache.tokens[row, 0, : cache.lengths[row], 0]
        logits[self.following(context)] = 3
        logits[(next_token(context) + 50) % VOCAB] = 2
        return logits


class Chain(TokenEngine):
    """The distribution of a token depends on the one before; `LOGITS` [last, next]."""

    LOGITS = np.random.default_rng(5).normal(size=(5, 5)).astype(np.float32)

    def _logits(self, cache: Any, row: int) -> Any:
        logits = np.full(VOCAB, -1e9, np.float32)
        logits[:5] = self.LOGITS[cache.tokens[row, 0, cache.lengths[row] - 1, 0]]
        return logits


def sampled(scheduler: Scheduler, prompt: list[int], new: int, seed: int, speculate: bool) -> list[int]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sampler = Sampler(SamplingParameters(temperature=1.0, seed=seed), VOCAB, prompt)
    ids = np.array(prompt, np.int64)
    request = Request(0, ids, new, frozenset(), sampler, None, deliver_here(events), speculate=speculate)
    answers = Answers([request], events, None)
    scheduler.submit([request])
    return tokens_of(answers)[0]


@pytest.fixture
def free(monkeypatch) -> None:
    """A pass costs what a step costs, however slow this machine is at either."""
    monkeypatch.setattr(Timing, "cost", 1.0)


PROMPT = list(range(20, 28)) * 3


@pytest.mark.parametrize("host", [True, False])
def test_greedy_tokens_are_the_same_in_fewer_steps(host, free) -> None:
    engine = Parrot(capacity=300, host=host)
    scheduler = Scheduler(engine)
    wanted = list(PROMPT)
    for _ in range(200):
        wanted.append(engine.following(wanted))
    assert tokens_of(ask(scheduler, PROMPT, new=200, speculate=True)) == [wanted[len(PROMPT) :]]
    status = scheduler.status()
    assert status.new_tokens == 200
    assert status.steps + status.accepted_tokens == 199  # the first one comes with the prompt
    assert status.accepted_tokens > 60
    assert status.guessed_tokens > status.accepted_tokens


def test_what_is_kept_for_reuse_is_what_was_said(free) -> None:
    scheduler = Scheduler(Parrot(capacity=300))
    (first,) = tokens_of(ask(scheduler, PROMPT, new=50, speculate=True, reuse=True))
    turn = [*PROMPT, *first, 4, 5]
    answers = ask(scheduler, turn, new=9, speculate=True, reuse=True)
    assert tokens_of(answers) == tokens_of(ask(Scheduler(Parrot(capacity=300)), turn, new=9))
    assert answers.requests[0].cached_tokens == (len(PROMPT) + 49) // 2 * 2


@pytest.mark.parametrize("left", [0, 1, 2, 5])
def test_rows_are_filled_to_the_last_token(left, free) -> None:
    capacity = len(PROMPT) + 20
    scheduler = Scheduler(Parrot(capacity=capacity))
    plain = tokens_of(ask(Scheduler(Parrot(capacity=capacity)), PROMPT, new=21 - left))
    assert tokens_of(ask(scheduler, PROMPT, new=21 - left, speculate=True)) == plain


def test_rows_beside_each_other_are_not_guessed_for(free) -> None:
    scheduler = Scheduler(TokenEngine())
    prompts = [[5, 6, 7] * 9, [8, 9] * 9]
    assert tokens_of(ask(scheduler, *prompts, new=12, speculate=True)) == [answer_to(p, 12) for p in prompts]


@pytest.mark.parametrize("seed", range(8))
def test_a_seed_draws_the_same(seed, free) -> None:
    plain = sampled(Scheduler(Parrot()), PROMPT, 60, seed, speculate=False)
    assert sampled(Scheduler(Parrot()), PROMPT, 60, seed, speculate=True) == plain


def test_the_distribution_is_the_models(free) -> None:
    """Chi-square of three tokens in a row against their exact probabilities; the seeds are fixed."""
    scheduler, prompt = Scheduler(Chain()), [*map(int, np.random.default_rng(1).integers(0, 5, 40)), 3]
    odds = np.exp(Chain.LOGITS.astype(np.float64))
    odds /= odds.sum(1, keepdims=True)
    draws = 2500
    counts = dict.fromkeys(itertools.product(range(5), repeat=3), 0)
    for seed in range(draws):
        counts[tuple(sampled(scheduler, prompt, 3, seed, speculate=True))] += 1
    expected = {(a, b, c): draws * odds[3, a] * odds[a, b] * odds[b, c] for a, b, c in counts}
    rare = {key for key, value in expected.items() if value < 5}
    cells = [(counts[key], value) for key, value in expected.items() if key not in rare]
    cells.append((sum(counts[key] for key in rare), sum(expected[key] for key in rare)))
    statistic = sum((seen - value) ** 2 / value for seen, value in cells)
    assert statistic < chi2.ppf(0.999, len(cells) - 1)
    assert scheduler.status().accepted_tokens > draws / 20


def test_guesses_are_what_followed_the_longest_match_last() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 2, 3, 4, 7, 1, 2, 3, 4])
    assert lookup.guess(10, 1.0)[:4] == [8, 2, 3, 4]
    assert lookup.guess(2, 1.0) == [8, 2]
    assert lookup.guess(0, 1.0) == []
    lookup.push(8)
    assert lookup.guess(3, 1.0) == [2, 3, 4]
    lookup.push(50)
    assert lookup.guess(10, 1.0) == []
    again = Lookup([5, 6, 5, 6, 5, 6])
    assert again.guess(4, 1.0) == [5, 6, 5, 6]


def answered(lookup: Lookup, answer: list[int], cost: float) -> list[int]:
    """The places of an answer where a guess was made, as the scheduler has them checked."""
    tried, place = [], 0
    while place < len(answer):
        guess = lookup.guess(8, cost)
        right = 0
        while right < len(guess) and answer[place + right : place + right + 1] == [guess[right]]:
            right += 1
        for token in answer[place : place + right + 1]:
            lookup.push(token)
        if guess:
            tried.append(place)
            lookup.saw(right)
        place += right + 1
    return tried


def test_guessing_stops_where_it_does_not_pay_and_begins_again_where_it_would() -> None:
    noise = np.random.default_rng(2).integers(0, 6, 1000).tolist()  # what came before two tokens tells nothing
    lookup = Lookup([7])
    assert len(answered(lookup, noise, cost=2.0)) < 20
    again = answered(lookup, [*range(10, 30)] * 8, cost=2.0)
    assert 10 < len(again) < 30
    assert again[0] < 60


def test_a_bundle_that_cannot_check_says_so(make_toy) -> None:
    with pytest.raises(InputError, match="--all-logits"):
        load(make_toy().path, threads=1).generate([5, 6], speculate=True)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.1}])
def test_on_a_bundle(options, make_toy, free) -> None:
    """The toy repeats itself soon."""
    with load(make_toy(all_logits=True).path, threads=1) as model:
        options = {"max_new_tokens": 50, "ignore_eos": True, **options}
        plain = [model.generate(prompt, **options) for prompt in ([5, 17, 200], [9, 9, 9, 9, 9, 9], [1, 2, 3] * 4)]
        before = model.status().steps
        quick = [
            model.generate(prompt, speculate=True, **options)
            for prompt in ([5, 17, 200], [9, 9, 9, 9, 9, 9], [1, 2, 3] * 4)
        ]
        assert quick == plain
        assert model.status().steps - before + model.status().accepted_tokens == 3 * 49
