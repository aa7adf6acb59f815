"""Generation against the decoder's own greedy tokens, and everything that is said to hold for batches, streams and seeds."""

from threading import Semaphore

import numpy as np
import pytest
import torch

from headfold.runtime import BundleError, CapacityError, Delta, Generation, HeadfoldError, InputError, Model, load
from headfold.runtime import session as session_module

PROMPTS = [[5, 17, 200, 33], [7], [250, 9, 9, 31, 77, 120, 64, 2, 299]]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_new_tokens": 12}
DAY = [{"role": "user", "content": "the lazy dog"}]


@pytest.fixture(scope="module")
def model(toy) -> Model:
    return load(toy.path, threads=1)


def until_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(0) + 1] if 0 in ids else ids


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_the_decoders(prompt, all_logits, make_toy) -> None:
    toy = make_toy(all_logits)
    answer = load(toy.path, threads=1).generate(prompt, max_new_tokens=20)
    assert answer.token_ids == until_eos(toy.greedy(prompt, 20))
    assert answer.prompt_tokens == len(prompt)
    assert answer.finish_reason == ("stop" if answer.token_ids[-1] == 0 else "length")


def test_chunked_prefill_changes_nothing(toy, model, monkeypatch) -> None:
    monkeypatch.setattr(session_module.OrtSession.prefill, "__defaults__", (False, 4))
    assert model.generate(PROMPTS[2], max_new_tokens=8).token_ids == until_eos(toy.greedy(PROMPTS[2], 8))


@pytest.mark.parametrize("options", [{"max_new_tokens": 20}, {}, {"max_new_tokens": 9, "ignore_eos": True}])
def test_a_batch_is_the_same_as_each_alone(options, model) -> None:
    assert model.generate(PROMPTS, **options) == [model.generate(prompt, **options) for prompt in PROMPTS]


def test_rows_that_end_early_leave_the_others_alone(model, toy) -> None:
    """Every row ends at another step, by a stop string of its own answer."""
    alone = [model.generate(prompt, max_new_tokens=30, ignore_eos=True) for prompt in PROMPTS]
    stops = {answer.text[3 + 2 * row : 5 + 2 * row] for row, answer in enumerate(alone)}
    together = model.generate(PROMPTS, max_new_tokens=30, ignore_eos=True, stop=list(stops))
    assert together == [model.generate(p, max_new_tokens=30, ignore_eos=True, stop=list(stops)) for p in PROMPTS]
    assert all(answer.finish_reason == "stop" for answer in together)


@pytest.mark.parametrize("options", [{"max_new_tokens": 15}, SAMPLED])
def test_streams_join_to_the_answer(options, model) -> None:
    answers = model.generate(PROMPTS, **options)
    deltas: list[Delta] = list(model.generate(PROMPTS, stream=True, **options))
    for index, answer in enumerate(answers):
        own = [delta for delta in deltas if delta.index == index]
        joined = "".join(delta.text for delta in own)
        ids = [delta.token_id for delta in own]
        assert Generation(joined, ids, own[-1].finish_reason, len(PROMPTS[index])) == answer
        assert not any(delta.finish_reason for delta in own[:-1])


def test_a_stream_begins_before_it_ends(model, monkeypatch) -> None:
    gate, decode = Semaphore(0), model.backend.decode
    monkeypatch.setattr(model.backend, "decode", lambda *a: gate.acquire() and decode(*a))
    stream = model.generate(PROMPTS[0], stream=True, max_new_tokens=10, ignore_eos=True)
    next(stream)  # while the first step of decoding cannot begin
    gate.release()
    next(stream)
    stream.close()
    gate.release()  # of a step that began before
    assert list(stream) == []


def test_stop_strings(model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=25, ignore_eos=True)
    stop = whole.text[6:9]
    answer = model.generate(PROMPTS[0], max_new_tokens=25, ignore_eos=True, stop=stop)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 25


def test_end_of_sequence_tokens(model, toy, changed) -> None:
    tokens = toy.greedy(PROMPTS[0], 12)
    ends = tokens[5]
    other = load(changed({"generation_config.json": {"eos_token_id": [299, ends]}}), threads=1)
    answer = other.generate(PROMPTS[0], max_new_tokens=12)
    assert answer.token_ids == tokens[: tokens.index(ends) + 1]
    assert answer.finish_reason == "stop"
    assert other.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True).token_ids == tokens
    assert other.generate([PROMPTS[0]], max_new_tokens=12)[0].text == answer.text
    assert model.eos_token_ids == {0}
    assert load(toy.path, check=False).eos_token_ids == {0}


def test_the_models_own_end_where_the_settings_name_none(changed) -> None:
    assert load(changed({"generation_config.json": {}}), threads=1).eos_token_ids == {0}


def test_sampling_repeats_by_seed_and_ignores_its_neighbours(model) -> None:
    first = model.generate(PROMPTS[0], **SAMPLED)
    assert model.generate(PROMPTS[0], **SAMPLED) == first
    assert model.generate([PROMPTS[0], PROMPTS[1]], **SAMPLED)[0] == first
    assert model.generate([PROMPTS[0], PROMPTS[2], PROMPTS[2]], **SAMPLED)[0] == first
    assert model.generate(PROMPTS[0], **SAMPLED | {"seed": 8}) != first
    same = model.generate([PROMPTS[0], PROMPTS[0]], **SAMPLED)
    assert same[0] != same[1]


def test_defaults_are_the_bundles(model, changed, monkeypatch) -> None:
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2}
    sampling = load(changed({"generation_config.json": settings}), threads=1)
    parameters = vars(sampling._calls.parameters({}, None))
    assert parameters == {
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
    }
    parameters = vars(sampling._calls.parameters({"temperature": 0.9, "top_k": 0, "top_p": None}, 3))
    assert parameters == {
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 0.8,
        "min_p": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 3,
    }
    assert sampling._calls.parameters({"temperature": 0}, None).temperature == 0
    assert model._calls.parameters({"top_p": 0.5}, None).temperature == 0
    with pytest.raises(TypeError, match="no option 'tempreture'"):
        model.generate("x", tempreture=1)


def test_a_temperature_means_nothing_unless_the_bundle_samples(changed) -> None:
    settings = {"temperature": 0.5, "repetition_penalty": 1.2}
    parameters = load(changed({"generation_config.json": settings}), threads=1)._calls.parameters({}, None)
    assert (parameters.temperature, parameters.repetition_penalty) == (0, 1.2)


def test_kinds_of_prompts_agree(model) -> None:
    options = {"max_new_tokens": 6}
    text = "the lazy dog"
    ids = model.tokenizer.encode(text).ids
    answer = model.generate(text, **options)
    assert answer == model.generate(ids, **options) == model.generate(np.array(ids), **options)
    assert [answer, answer] == model.generate([text, text], **options) == model.generate([text, ids], **options)
    assert [answer] == model.generate(np.array([ids]), **options)
    chat = model.generate(DAY, **options)
    assert [chat] == model.generate([DAY], **options)
    assert chat == model.generate(
        model.tokenizer.encode(model.chat_prompt(DAY), add_special_tokens=False).ids, **options
    )


def test_answers_fill_the_capacity_and_no_more(model) -> None:
    prompt = list(range(60))
    answer = model.generate(prompt, ignore_eos=True)
    assert len(answer.token_ids) == 4
    assert len(model.generate([prompt, [1]], ignore_eos=True)[1].token_ids) == 63
    assert len(model.generate(prompt, max_new_tokens=4, ignore_eos=True).token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("", {}, InputError, "the prompt is empty"),
        ([], {}, InputError, "the prompt is empty"),
        (["a", ""], {}, InputError, "the prompt is empty"),
        ([[1], []], {}, InputError, "the prompt is empty"),
        ([300], {}, InputError, "token 300 is not in the vocabulary. Token ids are 0 to 299."),
        ([-1], {}, InputError, "token -1 is not in the vocabulary"),
        ([1, "a"], {}, InputError, "token ids are not integers"),
        ([1.5], {}, InputError, "neither text nor token ids|not integers"),
        (5, {}, InputError, "a prompt cannot be a int"),
        ({"role": "user", "content": "x"}, {}, InputError, "a prompt cannot be a dict"),
        ([{"role": "user"}], {}, InputError, "message 0 is malformed"),
        (["a", None], {}, InputError, "not integers"),
        ("a", {"temperature": -1}, InputError, "temperature is -1"),
        ("a", {"top_p": 0}, InputError, "top_p is 0"),
        ("a", {"max_new_tokens": 0}, InputError, "max_new_tokens is 0"),
        ("a", {"max_new_tokens": 1.5}, InputError, "max_new_tokens is 1.5"),
        ("a", {"stop": ""}, InputError, "a stop string is empty"),
        ("a", {"stop": ["x", 5]}, InputError, "a stop string is empty, or no text"),
        ("a", {"stop": 5}, InputError, "a stop string is empty, or no text"),
        ("a", {"logit_bias": [1]}, InputError, "logit_bias is a list"),
        ("a", {"logits_processor": "x"}, InputError, "logits_processor is a str"),
        (np.array(3), {}, InputError, "a prompt cannot be a ndarray"),
        (DAY, {"template_variables": {"messages": []}}, InputError, "template_variables names messages"),
        (DAY, {"tools": 1}, InputError, "tools cannot be a int"),
        (DAY, {"template_variables": "x"}, InputError, "template_variables cannot be a str"),
        ([1] * 64, {}, CapacityError, "64 tokens and 1 new ones are 1 over the bundle's capacity of 64"),
        ([1] * 70, {}, CapacityError, "are 7 over"),
        ([[1], [1] * 50], {"max_new_tokens": 20}, CapacityError, "prompt 1: its 50 tokens and 20 new ones are 6 over"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_generated(prompt, options, kind, message, stream, model) -> None:
    """A stream, too, fails when it is asked for, not when it is read."""
    with pytest.raises(HeadfoldError, match=message) as caught:
        model.generate(prompt, stream=stream, **options)
    assert type(caught.value) is kind
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_bundle_without_a_tokenizer_takes_token_ids(changed, toy) -> None:
    model = load(
        changed({"tokenizer.json": None, "tokenizer_config.json": None, "chat_template.jinja": None}), threads=1
    )
    answer = model.generate([5, 17], max_new_tokens=3, ignore_eos=True)
    assert (answer.text, answer.token_ids) == ("", toy.greedy([5, 17], 3))
    for prompt, options, message in [
        ("text", {}, "the bundle has no tokenizer"),
        (DAY, {}, "the bundle has no chat template"),
        ([5], {"stop": "x"}, "the bundle has no tokenizer"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate(prompt, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_step(bad, temperature, model, monkeypatch) -> None:
    decode, steps = model.backend.decode, []

    def broken(cache, tokens, active):
        logits = decode(cache, tokens, active)
        steps.extend([1] * int(active.sum() == 3))  # not one that was under way when an earlier call was let go
        if len(steps) == 3:
            logits[1, :] = bad
        return logits

    monkeypatch.setattr(model.backend, "decode", broken)
    with pytest.raises(BundleError, match="the logits of token 4 of answer 1 are NaN or infinite, 4 tokens in"):
        model.generate(PROMPTS, ignore_eos=True, temperature=temperature)


def test_none_is_the_same_as_not_given(model) -> None:
    nothing = dict.fromkeys(("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed"))
    assert model.generate(PROMPTS[0], **nothing) == model.generate(PROMPTS[0])


@pytest.mark.parametrize("all_logits", [False, True])
def test_logits_are_the_decoders(all_logits, make_toy) -> None:
    toy = make_toy(all_logits)
    model = load(toy.path, threads=1)
    ids = np.random.default_rng(0).integers(0, 300, (2, 64))  # all of the capacity
    expected = toy.decoder(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-5)  # as in test_session.py
    one = model.logits(ids[0].tolist())
    assert one.shape == (64, 300)
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, expected[0], atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([[1, 2], [3]], "differ in length"),
        ([[[1]]], r"have the shape \[1, 1, 1\]"),
        (["a"], "not integers"),
        ([300], "token 300 is not in the vocabulary"),
        ([1] * 65, "65 tokens are 1 over the capacity of 64"),
    ],
)
def test_what_cannot_be_scored(ids, message, model) -> None:
    with pytest.raises(HeadfoldError, match=message):
        model.logits(ids)
