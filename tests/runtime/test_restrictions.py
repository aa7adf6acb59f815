"""What is forbidden, against transformers' logits processors; and what a bundle's generation_config.json asks for."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from headfold.export.bundle.genai import genai_config
from headfold.export.exportables.own import facts_of
from headfold.runtime import BundleError, InputError, load
from headfold.runtime.choosing.generation_settings import GenerationSettings, read_generation_settings
from headfold.runtime.choosing.restrictions import Forbidden, Restrictions

VOCAB, ENDS = 8, frozenset({1, 6})
TOKENS = st.integers(0, VOCAB - 1)


def expected(rules: Restrictions, prompt: list[int], new: list[int]) -> set[int]:
    """Tokens that transformers gives no chance, its processors made as in GenerationMixin._get_logits_processor."""
    ids, scores = torch.tensor([prompt + new]), torch.zeros(1, VOCAB)
    ends, start = torch.tensor(sorted(ENDS)), len(prompt)
    processors = [
        hf.NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size) if rules.no_repeat_ngram_size else None,
        hf.NoBadWordsLogitsProcessor(list(map(list, rules.bad_words_ids)), ends) if rules.bad_words_ids else None,
        hf.MinLengthLogitsProcessor(rules.min_length, ends) if rules.min_length else None,
        hf.MinNewTokensLengthLogitsProcessor(start, rules.min_new_tokens, ends) if rules.min_new_tokens else None,
        hf.SuppressTokensLogitsProcessor(list(rules.suppress_tokens)) if rules.suppress_tokens else None,
        hf.SuppressTokensAtBeginLogitsProcessor(list(rules.begin_suppress_tokens), start)
        if rules.begin_suppress_tokens
        else None,
    ]
    for processor in filter(None, processors):
        scores = processor(ids, scores)
    return set(torch.nonzero(scores[0] == -torch.inf).flatten().tolist())


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=12),
    new=st.lists(TOKENS, max_size=8),
    suppress=st.lists(TOKENS, max_size=2),
    begin=st.lists(TOKENS, max_size=2),
    words=st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=4),
    size=st.integers(0, 4),
    min_length=st.sampled_from([0, 3, 12]),
    min_new=st.sampled_from([0, 2, 5]),
)
def test_what_is_forbidden_is_what_transformers_forbids(
    prompt, new, suppress, begin, words, size, min_length, min_new
) -> None:
    if all(word in [[end] for end in ENDS] for word in words):
        words = []  # transformers refuses a list that is empty without the ends
    rules = Restrictions(tuple(suppress), tuple(begin), tuple(map(tuple, words)), size, min_length, min_new)
    forbidden = Forbidden(rules, np.array(prompt), ENDS, VOCAB)
    for token in new:
        forbidden.push(token)
    assert set(forbidden.tokens()) == expected(rules, prompt, new)


def test_tokens_that_do_not_exist_and_empty_words_are_of_no_effect() -> None:
    rules = Restrictions(suppress_tokens=(VOCAB, -1, 10**30), bad_words_ids=((), (3, VOCAB)))
    assert Forbidden(rules, np.array([3]), ENDS, VOCAB).tokens() == []


PROMPT = [5, 17, 200, 33]


def test_the_settings_fields_change_the_answer(toy, tmp_path) -> None:
    path = Path(shutil.copytree(toy.path, tmp_path / "bundle"))
    plain = toy.greedy(PROMPT, 12)
    assert 0 not in plain

    def answer(**fields):
        (path / "generation_config.json").write_text(json.dumps(fields))
        return load(path, threads=1, check=False).generate(PROMPT)

    assert len(answer(max_new_tokens=5, eos_token_id=None).token_ids) == 5
    assert len(answer(max_length=9.0).token_ids) == 5
    assert plain[0] not in answer(suppress_tokens=[plain[0]], max_new_tokens=8).token_ids
    assert answer(begin_suppress_tokens=[plain[0]], max_new_tokens=1).token_ids != plain[:1]
    ends = {"eos_token_id": [plain[0], plain[3]], "max_new_tokens": 12}
    assert answer(**ends).token_ids == plain[:1]
    assert len(answer(**ends, min_new_tokens=5).token_ids) >= 5
    text = load(toy.path, threads=1).generate(PROMPT, max_new_tokens=12).text
    stopped = answer(stop_strings=text[4:6], max_new_tokens=12)
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[4:6])], "stop")


def test_given_options_come_before_the_settings(changed) -> None:
    model = load(changed({"generation_config.json": {"max_new_tokens": 5, "stop_strings": ["a"]}}), threads=1)
    assert len(model.generate(PROMPT, max_new_tokens=7, ignore_eos=True, stop=["no such text"]).token_ids) == 7
    assert len(model.generate(PROMPT, max_new_tokens=None, stop=None).token_ids) <= 5


def test_an_empty_list_of_stop_strings_is_none_of_them_not_the_settings(toy, changed) -> None:
    text = load(toy.path, threads=1).generate(PROMPT, max_new_tokens=12).text
    model = load(changed({"generation_config.json": {"stop_strings": text[4:6]}}), threads=1)
    answers = [model.generate(PROMPT, max_new_tokens=12, stop=stop).text for stop in ([], None)]
    assert answers == [text, text[: text.index(text[4:6])]]


def test_settings_that_forbid_everything(changed) -> None:
    model = load(changed({"generation_config.json": {"suppress_tokens": list(range(300))}}), threads=1)
    with pytest.raises(InputError, match="forbids every token"):
        model.generate(PROMPT)


@pytest.mark.parametrize(
    "greedy",
    [
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 0.0, "temperature": -1},
        {"temperature": "hot"},
        {"min_p": 7, "top_k": 1.5},
    ],
)
def test_sampling_fields_mean_nothing_when_greedy(greedy, toy, changed) -> None:
    model = load(changed({"generation_config.json": greedy}), threads=1)
    assert model.generate(PROMPT, max_new_tokens=3).token_ids == toy.greedy(PROMPT, 3)
    assert len(model.generate(PROMPT, max_new_tokens=3, temperature=1.0, ignore_eos=True).token_ids) == 3


def test_sampling_fields_that_are_meant_and_wrong_are_named_with_their_file(changed) -> None:
    model = load(changed({"generation_config.json": {"do_sample": True, "top_k": -1}}), threads=1)
    message = r"generation_config\.json: top_k is -1, and must be 0 \(off\) or more. Give top_k, or"
    with pytest.raises(BundleError, match=message):
        model.generate(PROMPT)
    assert model.generate(PROMPT, top_k=5, max_new_tokens=1).token_ids


def test_what_is_not_done_is_said_once(changed, caplog) -> None:
    fields = {"num_beams": 4, "sequence_bias": [[[1], 2.0]], "typical_p": 0.9, "use_cache": True, "\x1b[2Jodd": 1}
    off = {"diversity_penalty": 0.0, "guidance_scale": 1.0, "penalty_alpha": None, "epsilon_cutoff": 0.0}
    with caplog.at_level(logging.WARNING, "headfold"):
        model = load(changed({"generation_config.json": fields | off}), threads=1)
        model.generate(PROMPT, max_new_tokens=1)
    assert len(caplog.records) == 1
    assert caplog.messages[0].endswith("does not do what these ask for: \ufffd[2Jodd, num_beams, sequence_bias.")
    assert GenerationSettings(do_sample=True, **fields).ignored[1:] == ["num_beams", "sequence_bias", "typical_p"]
    assert GenerationSettings(do_sample=True, **off).ignored == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": [2, [3]]}, r"eos_token_id is \[2, \[3\]\]"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: Input should be greater than or equal to 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"bad_words_ids": [1]}, r"bad_words_ids is \[1\]"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"stop_strings": [1]}, r"stop_strings is \[1\]"),
        ("[" * 10**5, "is nested too deeply"),
        (" " * (17 << 20), "has 17,825,792 bytes, and at most"),
        ("[]", "is no JSON object"),
    ],
)
def test_settings_that_cannot_be_meant(content, message, tmp_path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        read_generation_settings(tmp_path)


def test_onnxruntime_genai_stops_where_the_settings_say(config) -> None:
    facts = facts_of(config)
    made = genai_config(facts, 64, GenerationSettings(eos_token_id=[2, 4], bos_token_id=7))["model"]
    assert (made["eos_token_id"], made["pad_token_id"], made["bos_token_id"]) == ([2, 4], 2, 7)
    made = genai_config(facts, 64, GenerationSettings(eos_token_id=3.0, pad_token_id=5))["model"]
    assert (made["eos_token_id"], made["pad_token_id"]) == (3, 5)
    made = genai_config(facts, 64, GenerationSettings())["model"]
    assert (made["eos_token_id"], made["pad_token_id"]) == (0, 0)  # the model's own
