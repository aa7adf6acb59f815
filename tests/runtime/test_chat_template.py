"""Chat templates: what they are given, against transformers; and the bounds they run in, against programs that break them."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from headfold.runtime import BundleError, HeadfoldError, InputError, load
from headfold.runtime.templates import chat_template, template_worker
from headfold.runtime.text import Text

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
EVERYTHING = """{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}<{{ m.role }}>
    {%- if m.content is string %}{{ m.content }}
    {%- elif m.content is defined %}{% for part in m.content %}[{{ part.type }} {{ part.text }}]{% endfor %}
    {%- else %}nothing{% endif %}
    {%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}
    {%- if m.reasoning_content is defined %}({{ m.reasoning_content }}, {{ m.thinking }}){% endif %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<no thinking>{% endif %}
{%- set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.count }}
{%- if documents %}{{ documents }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"""
CHATS = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "tool call": [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"x": [1]}}}],
        },
        {"role": "tool", "content": "sunny"},
    ],
    "no content": [*HELLO, {"role": "assistant", "tool_calls": []}],
    "reasoning": [*HELLO, {"role": "assistant", "content": "4", "reasoning": "2 + 2"}],
}


def write(directory: Path, tokenizer: Tokenizer, template: object, **files: object) -> Text:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "chat_template": template}
    files = {"tokenizer_config": settings} | files
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return Text(directory)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "bos_token": "!"}])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("chat", CHATS)
def test_what_a_template_is_given_is_what_transformers_gives_it(chat, tools, variables, tokenizer, tmp_path) -> None:
    text = write(tmp_path, tokenizer, EVERYTHING)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    options = {"tools": tools, "add_generation_prompt": True}
    expected = reference.apply_chat_template(CHATS[chat], tokenize=False, **options, **variables)
    assert text.chat_prompt(CHATS[chat], tools=tools, variables=variables) == expected


def test_tools_have_a_template_of_their_own_where_there_is_one(tokenizer, tmp_path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].type }}"}]
    text = write(tmp_path, tokenizer, templates)
    assert (text.chat_prompt(HELLO), text.chat_prompt(HELLO, tools=[TOOL])) == ("plain", "function")
    with pytest.raises(InputError, match="no default chat template, only rag"):
        write(tmp_path, tokenizer, [{"name": "rag", "template": "x"}]).chat_prompt(HELLO)


def test_whatever_callers_give_reaches_the_template_as_plain_json(tokenizer, tmp_path) -> None:
    @dataclass
    class Point:
        x: int

    text = write(tmp_path, tokenizer, "{{ a | tojson }} {{ b is none }}")
    values = {"a": {"n": np.float32(0.5), "p": Point(1), 2: (1, True), "o": object, "t": Path("x")}, "b": None}
    shown = '{"n": 0.5, "p": {"x": 1}, "2": [1, true], "o": "<type>", "t": "<PosixPath>"} True'
    assert text.chat_prompt(HELLO, variables=values) == shown


MAPPED = {"bos_token": "<s>", "pad_token": {"content": "<pad>", "lstrip": False}, "image_token": "<image>"}


@pytest.mark.parametrize(
    "settings", [{}, {"bos_token": "<bos>"}, {"bos_token": "<bos>", "extra_special_tokens": {"x_token": "<x>"}}]
)
@pytest.mark.parametrize("older", [{}, MAPPED, {"bos_token": {"content": "<b>", "lstrip": False, "normalized": True}}])
def test_special_tokens_are_found_where_transformers_finds_them(settings, older, tokenizer, tmp_path) -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ x_token }}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | settings
    text = write(tmp_path, tokenizer, None, tokenizer_config=settings, special_tokens_map=older)
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(HELLO, tokenize=False)
    assert text.chat_prompt(HELLO) == expected


def test_generate_passes_tools_and_variables(changed) -> None:
    template = "{{ tools | length }}{{ enable_thinking }}{{ messages[0].content[0].text }}"
    model = load(changed({"chat_template.jinja": template}), threads=1)
    chat, given = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], {"enable_thinking": False}
    assert model.chat_prompt(chat, tools=[TOOL], template_variables=given) == "1Falsehi"
    answer = model.generate(chat, tools=[TOOL], template_variables=given, max_new_tokens=2)
    assert answer.prompt_tokens == len(model.tokenizer.encode("1Falsehi").ids)
    assert model.generate([chat, chat], tools=[TOOL], template_variables=given, max_new_tokens=2) == [answer] * 2
    for prompt, options in (("hi", {"tools": [TOOL]}), ([5], {"template_variables": given})):
        with pytest.raises(InputError, match="tools and template_variables are for messages"):
            model.generate(prompt, **options)


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([{"role": "user", "content": None}], None, "message 0 is malformed"),
        ([{"role": "user", "content": ["text"]}], None, "message 0 is malformed"),
        ([{"role": 1, "content": "x"}], None, "message 0 is malformed"),
        ([{"content": "x"}], None, "message 0 is malformed"),
        (HELLO, [print], "tool 0 is a builtin_function_or_method. A tool is a JSON schema"),
    ],
)
def test_what_is_no_message_or_tool(messages, tools, message, tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, tokenizer, "x").chat_prompt(messages, tools=tools)


def test_messages_that_hold_themselves(tokenizer, tmp_path) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(InputError, match="nested too deeply"):
        write(tmp_path, tokenizer, "x").chat_prompt([{"role": "user", "content": "x", "more": loop}])


DOUBLE = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = "
BOMBS = {
    "folded power": "{{ 7**(7**9) }}",
    "folded string": "{{ 'x' * 10**9 }}",
    "folded filter": "{{ 'x' | center(1000000000) }}",
    "folded escape": "{% autoescape 'x' | center(1000000000) %}x{% endautoescape %}",
    "power": "{{ (messages | length + 6) ** ((messages | length + 6) ** 9) }}",
    "string": "{{ messages[0].content * 10**9 }}",
    "list": "{{ (messages * 10**9) | length }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "two calls each": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "doubled by ~": DOUBLE + "ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubled by a block": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = t %}{% endfor %}{{ ns.x }}",
    "nested lists as text": DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as JSON": DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "nested tuples as keys": DOUBLE + "(ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} | length }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:>1000000000}'.format(1) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "replace": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "wide output": "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "wrapped words": "{{ ('x ' * 99999) | wordwrap(1, wrapstring='y' * 9999) }}",
    "filled batch": "{{ range(9) | batch(10**9, 0) | list | length }}",
    "many slices": "{{ range(9) | slice(10**8) | list | length }}",
    "links": "{{ ('www.a.com ' * 20000) | urlize(rel='x' * 9999) }}",
    "width of a format": "{{ '%*d' % (10**9, 1) }}",
    "digits of a format": "{{ '%.999999999f' % 1.0 }}",
    "justified": "{{ 'x'.ljust(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "translated": "{{ ('a' * 9999).translate({97: 'b' * 99999}) }}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "calls in calls": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "compared": DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | pprint }}",
    "endless sums": "{% for i in range(9999) %}{{ range(99999) | sort | sum }}{% endfor %}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_breaks_a_bound_is_one_line_in_bounded_time(bomb, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 1)
    start = time.monotonic()
    text = write(tmp_path, tokenizer, BOMBS[bomb])  # opening it computes nothing
    assert time.monotonic() - start < 1
    with pytest.raises(
        HeadfoldError, match=r"its chat template (takes|writes|calls|is broken)|refuses the messages"
    ) as caught:
        text.chat_prompt(HELLO)
    assert str(caught.value).isprintable()
    assert time.monotonic() - start < 10  # 1 second, and the next process's start, on a busy machine
    assert write(tmp_path, tokenizer, "fine").chat_prompt(HELLO) == "fine"


def test_text_within_the_bounds_comes_whole_whatever_its_characters_take_as_json(
    tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 60)  # of a busy machine; the process's own bound stays
    count = 3 * template_worker.OUTPUT_CHARACTERS // 4  # 12 bytes each
    text = write(tmp_path, tokenizer, f"{{{{ messages[0].content * {count} }}}}")
    assert text.chat_prompt([{"role": "user", "content": "\U0001f600"}]) == "\U0001f600" * count


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ " + "(" * 10**4 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "x" * (1 << 18 | 1),
        "{% for %}",
        "{{ a b }}",
    ],
)
def test_a_broken_template_is_found_when_the_bundle_is_opened(template, tokenizer, tmp_path) -> None:
    with pytest.raises(BundleError, match=r"its chat template (is broken|has over 262,144 characters)") as caught:
        write(tmp_path, tokenizer, template)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "template", [5, {"a": 1}, [1], [{"name": 1, "template": "x"}], [{"name": "default", "template": []}]]
)
def test_a_template_that_is_no_text(template, tokenizer, tmp_path) -> None:
    with pytest.raises(BundleError, match="its chat template is no text"):
        write(tmp_path, tokenizer, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__call__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ no_such_function() }}",
        "{{ messages | no_such_filter }}",
    ],
)
def test_what_the_sandbox_refuses(template, tokenizer, tmp_path) -> None:
    text = write(tmp_path, tokenizer, template)
    with pytest.raises(InputError, match="the chat template refuses the messages"):
        text.chat_prompt(HELLO)


def test_threads_get_their_own_answers_and_one_that_hangs_hurts_no_other(tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 1)
    good = write(tmp_path, tokenizer, "{{ messages[0].content * 3 }}")
    bad = write(tmp_path, tokenizer, BOMBS["loops"])

    def ask(number: int) -> str:
        if number == 7:
            with pytest.raises(BundleError, match="takes more than 1 seconds"):
                bad.chat_prompt(HELLO)
            return "777"
        return good.chat_prompt([{"role": "user", "content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(20))) == [str(n) * 3 for n in range(20)]


def test_an_interrupted_question_is_not_answered_to_the_next(tokenizer, tmp_path, monkeypatch) -> None:
    text = write(tmp_path, tokenizer, "{{ messages[0].content }}")
    exchange = chat_template._exchange

    def interrupted(process, request, seconds):
        process.stdin.write(request)
        process.stdin.flush()
        raise KeyboardInterrupt

    text.chat_prompt(HELLO)
    monkeypatch.setattr(chat_template, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.chat_prompt(HELLO)
    monkeypatch.setattr(chat_template, "_exchange", exchange)
    assert text.chat_prompt([{"role": "user", "content": "another"}]) == "another"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_process_of_its_own(tokenizer, tmp_path) -> None:
    text = write(tmp_path, tokenizer, "{{ messages[0].content }}")
    text.chat_prompt(HELLO)
    held = threading.Event()
    threading.Thread(target=lambda: (chat_template._worker._lock.acquire(), held.set())).start()
    held.wait()
    try:
        child = os.fork()
        if child == 0:
            os._exit(0 if text.chat_prompt(HELLO) == "hello" else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        chat_template._worker._lock.release()
    assert text.chat_prompt(HELLO) == "hello"


def test_without_a_python_to_start(tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "_worker", chat_template._Worker())
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    text = write(tmp_path, tokenizer, "x")  # opens, for a plain prompt needs no template
    with pytest.raises(InputError, match=r"Python cannot be started for the chat template: .*No such file"):
        text.chat_prompt(HELLO)
