"""What callers see of it on a real bundle: threads, event loops, several answers of one prompt, and what may be asked of each token."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from headfold.runtime import DeadlineError, HeadfoldError, InputError, Model, load

PROMPT = [5, 17, 200, 33]
PROMPTS = [PROMPT, [7], [250, 9, 9, 31, 77, 120, 64, 2, 299], [*PROMPT, 8], [1, 2, 3]]
NEAR = 1e-4  # between the two best logits: below it, which comes first is a matter of rounding
OPTIONS = {"max_new_tokens": 15, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(toy) -> Model:
    return load(toy.path, threads=1)


def logprobs_of(toy, tokens: list[int]) -> np.ndarray:
    """The oracle's, after each token."""
    return torch.log_softmax(toy.decoder(torch.tensor([tokens])).logits[0].double(), -1).numpy()


@pytest.mark.parametrize("reuse", [False, True])
def test_threads_get_what_a_lone_caller_gets(reuse, model) -> None:
    """But for near-ties, of which the toy has none on these prompts: then their place is named here."""
    alone = [model.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda i: model.generate(PROMPTS[i % 5], reuse=reuse, **OPTIONS), range(25)))
    for i, answer in enumerate(together):
        prompt, wanted = PROMPTS[i % 5], alone[i % 5].token_ids
        if answer.token_ids != wanted:
            place = next(k for k, (one, other) in enumerate(zip(answer.token_ids, wanted, strict=True)) if one != other)
            second, first = np.sort(model.logits([*prompt, *wanted[:place]])[-1])[-2:]
            assert first - second < NEAR, f"prompt {i % 5}, token {place}"


def test_a_seed_draws_the_same_whatever_runs_beside_it(model) -> None:
    options = {"temperature": 1.0, "seed": 3, **OPTIONS}
    alone = model.generate(PROMPT, **options)
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(model.generate, prompt, temperature=1.0, **OPTIONS) for prompt in PROMPTS * 4]
        assert model.generate(PROMPT, **options) == alone
        assert all(len(other.result().token_ids) == 15 for other in others)


def test_event_loops(model) -> None:
    async def ask() -> None:
        wanted = [model.generate(prompt, **OPTIONS) for prompt in PROMPTS]
        assert list(await asyncio.gather(*(model.agenerate(prompt, **OPTIONS) for prompt in PROMPTS))) == wanted
        assert await model.agenerate(PROMPTS, **OPTIONS) == wanted
        async with await model.agenerate(PROMPT, stream=True, **OPTIONS) as stream:
            assert [delta.token_id async for delta in stream] == wanted[0].token_ids
        with pytest.raises(InputError, match="the prompt is empty"):
            await model.agenerate("")
        task = asyncio.create_task(model.agenerate(PROMPT, max_new_tokens=50, ignore_eos=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())


def test_several_answers_of_one_prompt(model) -> None:
    options = {"temperature": 1.0, "seed": 5, **OPTIONS}
    three = model.generate(PROMPT, n=3, **options)
    assert three[0].token_ids == model.generate(PROMPT, **options).token_ids
    assert len({tuple(answer.token_ids) for answer in three}) == 3
    assert [
        [len(answer.token_ids) for answer in answers] for answers in model.generate(PROMPTS[:2], n=2, **OPTIONS)
    ] == [[15, 15]] * 2
    assert model.generate([PROMPT], n=1, **options) == [model.generate(PROMPT, n=1, **options)]
    deltas = list(model.generate(PROMPTS[:2], n=2, stream=True, max_new_tokens=1))
    assert sorted(delta.index for delta in deltas) == [0, 1, 2, 3]


def test_what_was_asked_before_is_reused_only_if_one_says_so(toy) -> None:
    with load(toy.path, threads=1) as model:
        first = model.generate(PROMPT, reuse=True, **OPTIONS)
        turn = [*PROMPT, *first.token_ids, 4, 5]
        again = model.generate(turn, reuse=True, **OPTIONS)
        assert (first.cached_tokens, again.cached_tokens) == (0, len(PROMPT) + 14)
        assert model.generate(turn, **OPTIONS).cached_tokens == 0
        assert again.token_ids == toy.greedy(turn, 15)
    with pytest.raises(InputError, match="the model is closed"):
        model.generate(PROMPT)
    with pytest.raises(InputError, match="the model is closed"):
        model.logits(PROMPT)


def test_probabilities_are_the_models_own(model, toy) -> None:
    answer = model.generate(PROMPT, top_logprobs=4, temperature=0.7, top_k=3, seed=1, presence_penalty=1, **OPTIONS)
    wanted = logprobs_of(toy, PROMPT + answer.token_ids)[len(PROMPT) - 1 :]
    assert answer.logprobs is not None
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    for one, row in zip(answer.logprobs, wanted, strict=False):
        assert one.logprob == pytest.approx(row[one.token_id], abs=1e-4)
        assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
    assert model.generate(PROMPT, top_logprobs=0, max_new_tokens=1).logprobs[0].top == ()
    assert model.generate(PROMPT, max_new_tokens=1).logprobs is None


def test_penalties_biases_and_processors_change_logits_as_they_say(model, toy) -> None:
    """Against the decoder, each token from scratch."""
    counted = []

    def processor(answer: list[int], logits: np.ndarray) -> np.ndarray:
        counted.append(len(answer))
        logits[::2] -= 1.5
        return logits

    options = {"presence_penalty": 1.5, "frequency_penalty": 0.75, "logit_bias": {11: 3, 44: -100}}
    answer = model.generate(PROMPT, logits_processor=processor, **options, **OPTIONS).token_ids
    for place, token in enumerate(answer):
        logits = toy.logits(PROMPT + answer[:place])[-1].astype(np.float64)
        counts = np.bincount(answer[:place], minlength=300)
        logits -= 0.75 * counts + 1.5 * (counts > 0)
        logits[11] += 3
        logits[44] -= 100
        logits[::2] -= 1.5
        assert token == logits.argmax()
    assert counted == list(range(15))


def test_a_processor_that_breaks_ends_its_own_answer_only(model) -> None:
    def breaks(answer: list[int], logits: np.ndarray) -> np.ndarray:
        raise KeyError("mine")

    stream = model.generate(PROMPT, stream=True, **OPTIONS)
    with pytest.raises(KeyError, match="mine"):
        model.generate(PROMPT, logits_processor=breaks)
    with pytest.raises(InputError, match="logits_processor returned"):
        model.generate(PROMPT, logits_processor=lambda _, logits: np.full_like(logits, -np.inf))
    with pytest.raises(InputError, match="cannot wait for an answer of its own model"):
        model.generate(PROMPT, logits_processor=lambda answer, _: model.generate(answer or [1]))
    assert len(list(stream)) == 15


def test_a_time_that_is_over(model) -> None:
    with pytest.raises(DeadlineError, match="when its time was over"):
        model.generate(PROMPT, timeout=1e-9)
    assert model.generate(PROMPT, timeout=1000, **OPTIONS) == model.generate(PROMPT, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"),
        ({"top_logprobs": 21}, "top_logprobs is 21. It must be a whole number, 0 to 20"),
        ({"timeout": 0}, "timeout is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'"),
        ({"logit_bias": {300: 1}}, "logit_bias has token 300"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101"),
    ],
)
def test_what_cannot_be_asked(options, message, model) -> None:
    with pytest.raises(HeadfoldError, match=message):
        model.generate(PROMPT, **options)
