"""A draft's guesses change no answer and no distribution; they save steps as far as it is right, and stop where it is not."""

import itertools
import queue
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import chi2
from token_engine import VOCAB, TokenEngine, answer_to, ask, next_token, tokens_of

from headfold.export.cli import main
from headfold.runtime import InputError, load
from headfold.runtime.choosing.sampling import Sampler, SamplingParameters
from headfold.runtime.scheduling.answers import Answers, deliver_here
from headfold.runtime.scheduling.drafting import Draft, Trust
from headfold.runtime.scheduling.lookup import Timing
from headfold.runtime.scheduling.request import Request
from headfold.runtime.scheduling.scheduler import Scheduler

PROMPT = [5, 9, 2, 44, 17]


class Pupil(TokenEngine):
    """Knows what the model says, but for one token in seven. Both depend on all of the row, so stale tokens would show."""

    def next_token(self, context: Any) -> int:
        right = next_token(context)
        return (right + 1) % VOCAB if right % 7 == 0 else right


class Fool(TokenEngine):
    """Is always wrong."""

    def next_token(self, context: Any) -> int:
        return (next_token(context) + 1) % VOCAB


class Chain(TokenEngine):
    """The distribution of a token depends on the one before; `logits` [last, next] of five tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.odds = np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32)

    def _logits(self, cache: Any, row: int) -> Any:
        logits = np.full(VOCAB, -1e9, np.float32)
        logits[:5] = self.odds[cache.tokens[row, 0, cache.lengths[row] - 1, 0]]
        return logits


@pytest.fixture(autouse=True)
def times(monkeypatch) -> None:
    """Of no clock: a pass costs two steps, a draft's token a tenth of one."""
    monkeypatch.setattr(Timing, "cost", 2.0)
    monkeypatch.setattr(Timing, "drafted", 0.1)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("draft", "fewest", "most"), [(TokenEngine, 150, 199), (Pupil, 80, 180), (Fool, 0, 0)])
def test_greedy_tokens_are_the_same(draft, fewest, most, host) -> None:
    scheduler = Scheduler(TokenEngine(host=host), draft=Draft(draft(), VOCAB))
    assert tokens_of(ask(scheduler, PROMPT, new=200, speculate=True)) == [answer_to(PROMPT, 200)]
    status = scheduler.status()
    assert status.new_tokens == 200
    assert status.steps + status.accepted_tokens == 199
    assert fewest <= status.accepted_tokens <= most


def test_who_does_not_speculate_needs_no_draft() -> None:
    draft = TokenEngine()
    assert tokens_of(ask(Scheduler(TokenEngine(), draft=Draft(draft, VOCAB)), PROMPT)) == [answer_to(PROMPT, 8)]
    assert draft.calls == []


@pytest.mark.parametrize("reuse", [False, True])
def test_a_long_prompt_is_caught_up_with_in_parts_and_kept_for_those_who_share(reuse) -> None:
    draft = TokenEngine(capacity=2000)
    scheduler = Scheduler(TokenEngine(capacity=2000), draft=Draft(draft, VOCAB))
    prompt = np.random.default_rng(3).integers(0, VOCAB, 1300).tolist()
    (first,) = tokens_of(ask(scheduler, prompt, new=30, speculate=True, reuse=reuse))
    assert first == answer_to(prompt, 30)
    parts = [count for kind, _, count in draft.calls if kind == "prefill" and count > 100]
    assert parts[:2] == [512, 512]
    assert scheduler.status().accepted_tokens > 15
    draft.calls.clear()
    turn = [*prompt, *first, 8]
    assert tokens_of(ask(scheduler, turn, new=30, speculate=True, reuse=reuse)) == [answer_to(turn, 30)]
    assert (max(count for kind, _, count in draft.calls if kind == "prefill") > 100) == (not reuse)


@pytest.mark.parametrize(("capacity", "vocab"), [(20, VOCAB), (400, 95)])
def test_a_draft_of_less_room_or_fewer_tokens_guesses_while_it_can(capacity, vocab) -> None:
    scheduler = Scheduler(TokenEngine(), draft=Draft(TokenEngine(capacity=capacity), vocab))
    assert tokens_of(ask(scheduler, PROMPT, new=300, speculate=True)) == [answer_to(PROMPT, 300)]
    assert 0 < scheduler.status().accepted_tokens < 150


def test_when_it_breaks_it_is_told_and_tried_anew() -> None:
    draft = TokenEngine()
    scheduler, draft.broken = Scheduler(TokenEngine(), draft=Draft(draft, VOCAB)), MemoryError("no")
    with pytest.raises(MemoryError):
        tokens_of(ask(scheduler, PROMPT, new=50, speculate=True))
    draft.broken = None
    assert tokens_of(ask(scheduler, PROMPT, new=50, speculate=True)) == [answer_to(PROMPT, 50)]
    scheduler.close()


def test_the_distribution_is_the_models(monkeypatch) -> None:
    """Chi-square of three tokens in a row against their exact probabilities, beside a draft of others; the seeds are fixed."""
    monkeypatch.setattr(Timing, "cost", 1.0)
    engine = Chain(5)
    scheduler, prompt = Scheduler(engine, draft=Draft(Chain(6), VOCAB)), [3]
    odds = np.exp(engine.odds.astype(np.float64))
    odds /= odds.sum(1, keepdims=True)
    draws = 2500
    counts = dict.fromkeys(itertools.product(range(5), repeat=3), 0)
    for seed in range(draws):
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sampler = Sampler(SamplingParameters(temperature=1.0, seed=seed), VOCAB, prompt)
        ids = np.array(prompt, np.int64)
        request = Request(0, ids, 3, frozenset(), sampler, None, deliver_here(events), speculate=True)
        scheduler.submit([request])
        counts[tuple(tokens_of(Answers([request], events, None))[0])] += 1
    expected = {(a, b, c): draws * odds[3, a] * odds[a, b] * odds[b, c] for a, b, c in counts}
    cells = [(counts[key], value) for key, value in expected.items() if value >= 5]
    rare = [key for key, value in expected.items() if value < 5]
    cells.append((sum(counts[key] for key in rare), sum(expected[key] for key in rare)))
    assert sum((seen - value) ** 2 / value for seen, value in cells) < chi2.ppf(0.999, len(cells) - 1)
    assert scheduler.status().accepted_tokens > draws / 20


def test_guesses_grow_where_they_are_right_and_stop_where_they_are_not() -> None:
    timing, trust = Timing(), Trust()
    for _ in range(20):
        size = trust.size(8, timing)
        trust.saw(size, size)
    assert size == 8
    assert trust.size(3, timing) == 3
    assert trust.size(0, timing) == 0
    asked = 0
    for _ in range(1000):
        size = trust.size(8, timing)
        asked += size
        if size:
            trust.saw(size, 0)
    assert asked < 80
    for _ in range(300):  # and another time
        size = trust.size(8, timing)
        if size:
            trust.saw(size, size)
    assert size == 8


def test_on_a_bundle(make_toy, monkeypatch) -> None:
    monkeypatch.setattr(Timing, "cost", 1.0)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    small = make_toy().path
    with load(make_toy(all_logits=True).path, threads=1, draft=small) as model, load(small, threads=1) as plain:
        for more in ({}, {"temperature": 0.8, "seed": 3}):
            answers = [one.generate([5, 17, 200], **options, **more).token_ids for one in (model, plain)]
            assert answers[0] == answers[1]
        assert model.status().accepted_tokens > 20
        before = model.status().guessed_tokens
        model.generate([5, 17, 200], speculate=False, **options)
        assert model.status().guessed_tokens == before


def test_on_the_command_line(make_toy) -> None:
    bundle, small = make_toy(all_logits=True).path, make_toy().path
    words = ["the quick", "-n", "20", "--threads", "1"]
    plain, drafted = (
        CliRunner().invoke(main, ["generate", str(bundle), *words, *more]) for more in ([], ["--draft", str(small)])
    )
    assert (drafted.exit_code, drafted.stdout) == (0, plain.stdout)
    talk = CliRunner().invoke(main, ["chat", str(bundle), "--draft", str(small), *words[1:]], input="the fox\n")
    assert talk.exit_code == 0


def test_a_draft_must_have_the_same_tokens_and_a_model_that_checks(make_toy, changed) -> None:
    with pytest.raises(InputError, match="--all-logits"):
        load(make_toy().path, threads=1, draft=make_toy().path)
    other = changed({"tokenizer.json": None})
    with pytest.raises(InputError, match="changed: its tokenizer has not the tokens of"):
        load(make_toy(all_logits=True).path, threads=1, draft=other)
