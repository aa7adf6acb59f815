"""Sampling against transformers' logits processors, draws against their probabilities, and ranges of parameters."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from headfold.runtime import InputError
from headfold.runtime.choosing.sampling import Sampler, SamplingParameters, candidates, penalized

VOCAB = 50


def expected(logits: np.ndarray, prompt: list[int], p: SamplingParameters) -> np.ndarray:
    """Probabilities [V] by transformers, in the order of GenerationMixin._get_logits_processor."""
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty) if p.repetition_penalty != 1 else None,
        hf.TemperatureLogitsWarper(p.temperature) if p.temperature != 1 else None,
        hf.TopKLogitsWarper(p.top_k) if p.top_k else None,
        hf.TopPLogitsWarper(p.top_p) if p.top_p < 1 else None,
        hf.MinPLogitsWarper(p.min_p) if p.min_p else None,
    ]
    scores = torch.from_numpy(logits)[None].double()
    for processor in filter(None, processors):
        scores = processor(torch.tensor([prompt]), scores)
    return scores.softmax(-1)[0].numpy()


def actual(logits: np.ndarray, prompt: list[int], p: SamplingParameters) -> np.ndarray:
    seen = np.zeros(len(logits), bool)
    seen[prompt] = True
    tokens, probabilities = candidates(penalized(logits, seen, p.repetition_penalty), p)
    result = np.zeros(len(logits))
    result[tokens] = probabilities
    return result


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 49, 50, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_probabilities_equal_transformers(seed, spread, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(VOCAB) * spread).astype(np.float32)
    prompt = rng.integers(0, VOCAB, 7).tolist()
    p = SamplingParameters(temperature, top_k, top_p, min_p, repetition_penalty)
    np.testing.assert_allclose(actual(logits, prompt, p), expected(logits, prompt, p), atol=1e-5)  # float32 softmax


def test_ties_with_the_kth_stay() -> None:
    logits = np.array([1, 2, 2, 0], np.float32)
    p = SamplingParameters(1.0, top_k=1)
    np.testing.assert_allclose(actual(logits, [0], p), expected(logits, [0], p), atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(VOCAB) * 2).astype(np.float32)
    p = SamplingParameters(0.8, top_k=20, top_p=0.9, seed=1)
    sampler, count = Sampler(p, VOCAB, []), 20_000
    frequencies = np.bincount([sampler(logits) for _ in range(count)], minlength=VOCAB) / count
    probabilities = expected(logits, [0], p)
    assert (frequencies[probabilities == 0] == 0).all()
    deviation = np.sqrt(probabilities * (1 - probabilities) / count)
    assert (abs(frequencies - probabilities) <= 5 * deviation).all()  # five sigma: once in a million


def test_greedy_and_cold() -> None:
    logits = np.array([1, 9000, -9000, 8999], np.float32)
    assert Sampler(SamplingParameters(), 4, [])(logits) == 1
    assert Sampler(SamplingParameters(1e-6), 4, [])(logits) == 1
    assert Sampler(SamplingParameters(1e-6, top_p=0.1, min_p=1.0, top_k=2), 4, [])(logits) == 1


def test_the_penalty_applies_to_greedy_and_to_what_was_generated() -> None:
    logits = np.array([3, 2, 1.5], np.float32)
    kept = logits.copy()
    sampler = Sampler(SamplingParameters(repetition_penalty=2.5), 3, prompt=[])
    assert [sampler(logits) for _ in range(3)] == [0, 1, 2]
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [1.0, 1e30, 3e38])
@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e308},
        {"temperature": np.float64(1e200)},
        {"temperature": Fraction(1, 3)},
        {"temperature": 1e-6},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"top_p": 5e-324},
        {"min_p": 5e-324},
        {"top_k": 10**30, "seed": 10**50},
    ],
)
def test_extreme_parameters_still_draw_a_token(extreme, spread) -> None:
    logits = np.linspace(-spread, spread, VOCAB, dtype=np.float32)
    sampler = Sampler(SamplingParameters(**{"temperature": 1.0} | extreme), VOCAB, range(0, VOCAB, 2))
    assert all(0 <= sampler(logits) < VOCAB for _ in range(5))
    tokens, probabilities = candidates(logits, sampler.parameters)
    assert len(tokens) == len(probabilities) >= 1
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)  # float32


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None, row: int) -> list[int]:
        sampler = Sampler(SamplingParameters(1.0, seed=seed), 1000, [], row)
        return [sampler(logits) for _ in range(8)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(*key)) for key in [(1, 0), (1, 1), (2, 0), (None, 0), (None, 0)]}) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-9},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"repetition_penalty": 10**400},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": True},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_parameters_out_of_range(wrong) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name} is .*It must be"):
        SamplingParameters(**wrong)
