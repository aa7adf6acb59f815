"""Answers of a prescribed form, on a random model, which would never keep to it by itself."""

import json
import re
import sys

import numpy as np
import pytest

from headfold.runtime import InputError, Model, load

PROMPT = [5, 17, 200, 33]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WILD = {"temperature": 3.0, "max_new_tokens": 50}


@pytest.fixture(scope="module")
def model(toy) -> Model:
    return load(toy.path, threads=1)


@pytest.mark.parametrize("options", [{"temperature": 0}, *({**WILD, "seed": seed} for seed in range(4))])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_json_of_a_schema(options, ignore_eos, model) -> None:
    answer = model.generate(PROMPT, json_schema=SCHEMA, ignore_eos=ignore_eos, **options)
    found = json.loads(answer.text)
    assert set(found) == {"a", "b"}
    assert 0 <= found["a"] <= 99
    assert found["b"] in ("x", "yes")
    assert answer.text == json.dumps(found)
    assert answer.finish_reason == "stop"


def test_a_grammar_and_its_end(model) -> None:
    """A number may go on or end: the model's end-of-sequence token decides, and is allowed only where the number is whole."""
    found = {model.generate(PROMPT, grammar='start: /[0-9]{2,4}/ "."?', seed=s, **WILD).text for s in range(12)}
    assert all(re.fullmatch(r"[0-9]{2,4}\.?", text) for text in found)
    assert len(found) > 4


def test_each_answer_has_its_own(model) -> None:
    answers = model.generate([PROMPT, [9]], n=3, json_schema=SCHEMA, seed=1, **WILD)
    texts = [answer.text for several in answers for answer in several]
    assert len(set(texts)) > 1
    assert all(set(json.loads(text)) == {"a", "b"} for text in texts)
    joined = "".join(delta.text for delta in model.generate(PROMPT, stream=True, json_schema=SCHEMA, seed=1, **WILD))
    assert joined == texts[0]


def test_a_caller_may_change_logits_but_not_leave_the_form(model) -> None:
    def only_letters(_: list[int], logits: np.ndarray) -> np.ndarray:
        logits[model.tokenizer.token_to_id("Q")] = 1e4
        return logits

    answer = model.generate(PROMPT, json_schema=SCHEMA, logits_processor=only_letters)
    assert "Q" not in answer.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": {"type": "number"}, "grammar": "start: /a/"}, "both json_schema and grammar"),
        ({"json_schema": {"type": "foo"}}, "json_schema cannot be followed: .*foo"),
        ({"json_schema": "{}"}, "json_schema is a str"),
        (
            {"json_schema": json.loads('{"items":' * 150 + "{}" + "}" * 150)},
            "json_schema cannot be followed: recursion",
        ),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"),
        ({"grammar": "start: /a(/"}, "grammar cannot be followed: .*unclosed group"),
        ({"grammar": "start: /" + "a" * (1 << 20) + "/"}, "grammar has over"),
        ({"grammar": b"x"}, "grammar is a bytes"),
    ],
)
def test_what_is_no_form(options, message, model) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model.generate(PROMPT, max_new_tokens=4, **options)
    assert "\n" not in str(caught.value)


def test_what_a_grammar_needs(changed, model, monkeypatch) -> None:
    bundle = changed({"tokenizer.json": None, "tokenizer_config.json": None, "chat_template.jinja": None})
    with pytest.raises(InputError, match="the bundle has no tokenizer"):
        load(bundle, threads=1).generate(PROMPT, grammar="start: /a/")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with load(model.bundle, threads=1) as other, pytest.raises(InputError, match=r"headfold\[grammar\]"):
        other.generate(PROMPT, grammar="start: /a/")
