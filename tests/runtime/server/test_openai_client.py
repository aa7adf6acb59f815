"""OpenAI's own client against a running server: what it gets is what the model's own `generate` gives."""

import json
import re
import threading
import time
from pathlib import Path

import openai
import pytest
from toy_tokenizer import toy_tokenizer

from headfold.runtime.scheduling.request import TokenLogprob
from headfold.runtime.server.protocol.token_texts import TokenTexts
from headfold.runtime.server.settings import Limits, Settings

CONVERSATION = [{"role": "user", "content": "the quick brown fox"}]
LONG = "the lazy dog sleeps on and on"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "pet",
        "schema": {
            "type": "object",
            "properties": {"age": {"enum": [1, 23]}},
            "required": ["age"],
            "additionalProperties": False,
        },
    },
}
CALLED = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").max_model_len == 64
    with pytest.raises(openai.NotFoundError, match="The model 'gpt-7' does not exist; there are: toy") as caught:
        client.models.retrieve("gpt-7")
    assert caught.value.code == "model_not_found"


def test_a_chat_is_the_models_own_answer(client, toy_model) -> None:
    wanted = toy_model.generate(CONVERSATION, max_new_tokens=12, ignore_eos=True)
    asked = {"model": "toy", "messages": CONVERSATION, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (wanted.prompt_tokens, 12)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == wanted.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    assert (
        chunks[-1].usage.prompt_tokens_details.cached_tokens == (wanted.prompt_tokens - 2) // 2 * 2
    )  # asked a second time


def test_what_is_not_asked_for_is_what_fits(client) -> None:
    answer = client.chat.completions.create(model="toy", messages=CONVERSATION, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 64
    assert (
        client.completions.create(model="toy", prompt="the", extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )


def test_completions_of_many_prompts(client, toy_model) -> None:
    prompts = ["the quick", "dog"]
    options = {"max_tokens": 6, "temperature": 0.9, "seed": 4, "n": 2}
    answer = client.completions.create(model="toy", prompt=prompts, **options, extra_body={"ignore_eos": True})
    wanted = toy_model.generate(prompts, max_new_tokens=6, temperature=0.9, seed=4, n=2, ignore_eos=True)
    assert [choice.text for choice in answer.choices] == [one.text for several in wanted for one in several]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(several[0].prompt_tokens for several in wanted)
    ids = [toy_model.tokenizer.encode(prompt).ids for prompt in prompts]
    again = client.completions.create(model="toy", prompt=ids, **options, extra_body={"ignore_eos": True})
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    stream = client.completions.create(model="toy", prompt=ids, **options, stream=True, extra_body={"ignore_eos": True})
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_a_seed_draws_the_same(client) -> None:
    def draw(seed: int) -> list[str]:
        asked = {"messages": CONVERSATION, "max_tokens": 8, "temperature": 1, "seed": seed, "n": 3}
        answer = client.chat.completions.create(model="toy", **asked, extra_body={"ignore_eos": True})
        return [choice.message.content for choice in answer.choices]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3


def test_a_stop_string_ends_the_answer_before_it(scripted) -> None:
    client, _ = scripted("one two three four")
    for stop in (" three", ["four", " th"]):
        answer = client.chat.completions.create(model="script", messages=CONVERSATION, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two", "stop")
        assert (
            text_of(client.chat.completions.create(model="script", messages=CONVERSATION, stop=stop, stream=True))
            == "one two"
        )


def test_log_probabilities(client, toy_model) -> None:
    wanted = toy_model.generate(CONVERSATION, max_new_tokens=5, ignore_eos=True, top_logprobs=3).logprobs
    asked = {"messages": CONVERSATION, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(model="toy", **asked, extra_body={"ignore_eos": True})
    content = answer.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    assert [[top.logprob for top in one.top_logprobs] for one in content] == [
        pytest.approx([value for _, value in one.top], abs=1e-4) for one in wanted
    ]
    assert (
        bytes(byte for one in content for byte in one.bytes).decode(errors="replace")
        == answer.choices[0].message.content
    )
    stream = client.chat.completions.create(model="toy", **asked, stream=True, extra_body={"ignore_eos": True})
    streamed = [one for chunk in stream if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [(one.token, one.bytes) for one in streamed] == [(one.token, one.bytes) for one in content]
    old = client.completions.create(
        model="toy", prompt="the quick", max_tokens=3, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = old.choices[0].logprobs
    assert "".join(logprobs.tokens) == old.choices[0].text
    assert logprobs.text_offset == [0, len(logprobs.tokens[0]), len("".join(logprobs.tokens[:2]))]
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx(logprobs.token_logprobs)


def test_log_probabilities_of_halves_and_of_what_is_no_text() -> None:
    tokenizer = toy_tokenizer(300)
    end, a = (tokenizer.token_to_id(token) for token in ("<eos>", "a"))
    halves = [token for token in range(300) if TokenTexts(tokenizer).of(token)[0] == "\ufffd"][:2]
    top = ((halves[0], -1.0), (a, -2.0), (halves[1], -3.0))
    told = TokenTexts(tokenizer).completion([TokenLogprob(token, -1.0, top) for token in (a, end, a)], 3, offset=5)
    assert told.top_logprobs == [{"\ufffd": -1.0, "a": -2.0}] * 3  # the likelier of two that look alike
    assert told.text_offset == [5, 6, 6]  # the text has no <eos>


def test_an_answer_follows_the_schema_that_is_asked_for(client, monkeypatch) -> None:
    asked = {"model": "toy", "messages": CONVERSATION, "temperature": 2, "n": 3, "seed": 1}
    answer = client.chat.completions.create(**asked, response_format=SCHEMA)
    assert {choice.message.content for choice in answer.choices} <= {'{"age": 1}', '{"age": 23}'}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    anything = client.chat.completions.create(**asked, max_tokens=3, response_format={"type": "json_object"})
    assert {choice.message.content[0] for choice in anything.choices} == {"{"}
    monkeypatch.setattr("headfold.runtime.server.routes.chat.find_spec", lambda _: None)
    with pytest.raises(openai.UnprocessableEntityError, match=r"headfold\[grammar\]"):
        client.chat.completions.create(**asked, response_format=SCHEMA)


def test_tools_are_asked_for_by_the_template_and_read_from_the_answer(scripted) -> None:
    client, model = scripted(lambda prompt: "It rains." if "tool\n" in prompt else CALLED)
    asked = {"model": "script", "messages": CONVERSATION, "tools": [WEATHER]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert json.dumps(WEATHER["function"]["parameters"]) in model.backend.prompts[-1]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Zürich"},
    )
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    (streamed,) = (one for chunk in chunks for one in chunk.delta.tool_calls or [])
    assert (streamed.index, streamed.function) == (0, type(streamed.function)(**call.function.model_dump()))
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
    assert chunks[-1].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    turn = [*CONVERSATION, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model="script", messages=turn, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>' in model.backend.prompts[-1]
    plain = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (plain.message.content, plain.message.tool_calls) == (CALLED, None)
    assert "weather" not in model.backend.prompts[-1]


def test_calls_in_a_form_that_the_template_does_not_name_are_text(scripted) -> None:
    client, _ = scripted(CALLED, template="{{ tools }}{{ '<|im_start|>assistant\n' }}")
    choice = client.chat.completions.create(model="script", messages=CONVERSATION, tools=[WEATHER]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLED, None, "stop")


def test_a_developer_is_the_system_and_parts_are_text(scripted) -> None:
    client, model = scripted("yes")
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="script", messages=messages)
    assert (
        model.backend.prompts[-1] == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo\nparts<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature is -1"),
        ({"max_tokens": 0}, openai.BadRequestError, "Invalid 'max_tokens'"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "more than the 64"),
        ({"max_tokens": 60}, openai.BadRequestError, "over the bundle's capacity"),
        ({"n": 1000}, openai.BadRequestError, "1000 answers are more than 128"),
        ({"stop": [""]}, openai.BadRequestError, "a stop string is empty"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "The keys of logit_bias are token ids"),
        ({"logit_bias": {"300": 1}}, openai.BadRequestError, "logit_bias has token 300"),
        ({"messages": []}, openai.BadRequestError, "Invalid 'messages'"),
        ({"messages": [{"role": "user", "content": LONG * 9}]}, openai.BadRequestError, "over the bundle's capacity"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "Invalid 'messages.0.role'"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs is for requests with logprobs"),
        ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "Unrecognized request argument: tempreature"),
        ({"model": "other"}, openai.NotFoundError, "The model 'other' does not exist"),
        (
            {"response_format": {"type": "json_schema"}},
            openai.BadRequestError,
            "json_schema is for the type of its name",
        ),
        ({"response_format": SCHEMA, "tools": [WEATHER]}, openai.UnprocessableEntityError, "can call no tools"),
        ({"tool_choice": "required", "tools": [WEATHER]}, openai.UnprocessableEntityError, "A call cannot be forced"),
    ],
)
def test_errors_are_openais(asked, error, says, client) -> None:
    with pytest.raises(error, match=says) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": CONVERSATION, "max_tokens": 2} | asked)
    assert caught.value.type in ("invalid_request_error", "not_found_error")


def test_a_prompt_that_is_too_long_is_told_by_its_code(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt=[5] * 65)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="echo is not supported"):
        client.completions.create(model="toy", prompt="x", echo=True)


def test_readmes_example(scripted, capsys) -> None:
    client, _ = scripted("yes", name="smol")
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "from openai" in part)
    exec(block.replace("http://127.0.0.1:8000/v1", str(client.base_url)), {})
    assert capsys.readouterr().out == "yes\n"


def test_whoever_comes_beyond_the_queue_is_told_so(scripted) -> None:
    client, model = scripted("yes", slots=1, waiting=1)
    model.backend.hold()
    threads = []
    for place in range(2):
        threads.append(
            threading.Thread(target=lambda: client.chat.completions.create(model="script", messages=CONVERSATION))
        )
        threads[-1].start()
        until(lambda: model.status().live + model.status().waiting == place + 1)  # noqa: B023
        until(lambda: model.status().live == 1)
    with pytest.raises(openai.RateLimitError, match="1 prompts wait already") as caught:
        client.chat.completions.create(model="script", messages=CONVERSATION)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")
    model.backend.turn.release(1000)
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_leaves_the_slot_to_others(stream, scripted) -> None:
    client, model = scripted("on and " * 300)
    model.backend.hold()
    if stream:
        answer = client.chat.completions.create(model="script", messages=CONVERSATION, stream=True)
        model.backend.turn.release(3)
        next(answer)
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(model="script", messages=CONVERSATION)
    before = len(model.backend.calls)

    def is_free() -> bool:
        model.backend.turn.release()  # a step at a time: it has all the time it needs to see that they are gone
        return model.status().live == 0

    until(is_free)
    assert len(model.backend.calls) < before + 1400  # of the 1500 tokens


def test_an_answer_that_takes_too_long_is_an_error_in_both_ways(scripted) -> None:
    client, model = scripted("yes", Settings(limits=Limits(seconds=0.2)))

    def late() -> None:
        until(lambda: model.status().live == 1)
        time.sleep(0.3)
        model.backend.turn.release(1000)

    def held() -> threading.Thread:
        model.backend.hold()
        thread = threading.Thread(target=late)
        thread.start()
        return thread

    thread = held()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="script", messages=CONVERSATION)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    thread.join()
    thread = held()
    stream = client.chat.completions.create(model="script", messages=CONVERSATION, stream=True)
    with pytest.raises(openai.APIError, match="when its time was over"):
        list(stream)
    thread.join()


def test_an_engine_that_breaks_is_an_error_without_its_words(scripted) -> None:
    client, model = scripted("yes")
    model.backend.broken = ValueError("a secret path")
    with pytest.raises(openai.InternalServerError, match="the server's log has it"):
        client.chat.completions.create(model="script", messages=CONVERSATION)
    model.backend.broken = None
    assert client.chat.completions.create(model="script", messages=CONVERSATION).choices[0].message.content == "yes"
