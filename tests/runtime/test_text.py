"""Tokenizer, chat template and detokenizer against transformers and the tokenizers library."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headfold.export.bundle.writer import write_json
from headfold.runtime import InputError
from headfold.runtime.text import Detokenizer, Text

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "  Grüße, 世界!  "},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": 'Say "x"'},
]
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if tools is not none %}{{ "TOOLS" }}{%- endif %}
{%- for message in messages %}
    {%- if loop.index > 3 %}
        {%- break %}
    {%- endif %}
    {{- '<|start|>' + message['role'] + date_string[:0] + '\n' + message['content'] | trim }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ 'kept' }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
    {% if add_generation_prompt %}
tail {{ eos_token }}{{ pad_token }}
    {% endif %}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = {"__type": "AddedToken", "content": "<eos>", "special": True}  # how Llama's own settings spell a token
SETTINGS = {"bos_token": "<bos>", "eos_token": EOS}


def write(directory: Path, tokenizer: Tokenizer | None, template: str | None = None, **settings) -> Text:
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    write_json(
        directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | SETTINGS | settings
    )
    return Text(directory)


def copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["ChatML", "Llama"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_template_equals_transformers(template, generation_prompt, tokenizer, tmp_path) -> None:
    text = write(tmp_path, tokenizer, template)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    options = {"add_generation_prompt": generation_prompt}
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert text.chat_prompt(MESSAGES, generation_prompt) == expected
    ids = reference.apply_chat_template(MESSAGES, return_dict=False, add_generation_prompt=True)
    assert text.encode_chat(MESSAGES) == ids


def test_named_templates(tokenizer, tmp_path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    text = write(tmp_path, tokenizer, chat_template=templates)
    assert text.chat_prompt(MESSAGES[:1]).startswith("<|im_start|>system\nBe brief")


@pytest.mark.parametrize("add_bos", [None, True, False])  # transformers 5 ignores what the settings say of it
@pytest.mark.parametrize("processor", [True, False], ids=["processor adds BOS", "processor adds nothing"])
def test_bos_as_in_transformers(add_bos, processor, tokenizer, tmp_path) -> None:
    tokenizer = copy(tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    text = write(tmp_path, tokenizer, **({} if add_bos is None else {"add_bos_token": add_bos}))
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)("the lazy dog")["input_ids"]
    assert text.encode("the lazy dog") == expected
    assert (expected[0] == 1) == processor


def test_truncation_and_padding_of_the_training_are_off(tokenizer, tmp_path) -> None:
    tokenizer = copy(tokenizer)
    expected = tokenizer.encode("the quick brown fox").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    assert write(tmp_path, tokenizer).encode("the quick brown fox") == expected


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, MESSAGES, "the bundle has no chat template. Give a plain prompt"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, "refuses the messages: roles must alternate"),
        ("{{ messages[9].content.x }}", MESSAGES, "refuses the messages"),
        ("{{ messages[0]['content'] + 1 }}", MESSAGES, "refuses the messages: can only concatenate str"),
        ("{{ messages.append(1) }}", MESSAGES, "refuses the messages: .*unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", MESSAGES, "refuses the messages: .*unsafe"),
        (CHATML, [{"role": "user"}], "message 0 is malformed. A message is"),
        (CHATML, [MESSAGES[0], {"role": "user", "content": None}], "message 1 is malformed"),
        (CHATML, [MESSAGES[0], "hello"], "message 1 is malformed"),
    ],
)
def test_chats_that_cannot_be_used(template, messages, message, tokenizer, tmp_path) -> None:
    text = write(tmp_path, tokenizer, template)
    with pytest.raises(InputError, match=message):
        text.chat_prompt(messages)


def test_text_needs_a_tokenizer_and_unicode(tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\. Give token ids"):
        write(tmp_path, None).encode("x")
    with pytest.raises(InputError, match="half a surrogate pair"):
        write(tmp_path, tokenizer).encode("\ud800")


def test_a_tokenizer_whose_rust_panics_is_one_line(tokenizer, tmp_path) -> None:
    """Its regular expression gives up."""
    bad = copy(tokenizer)
    bad.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(InputError, match=r"the tokenizer refuses the text: .*retry-limit") as caught:
        write(tmp_path, bad).encode("a" * 40 + "!")
    assert str(caught.value).isprintable()


def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: a leading space is part of a word and dropped at the start; unknown text is bytes."""
    words = ["<unk>", "<s>", "▁the", "▁dog", "s", "▁"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def write_all(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.push(None)]


TEXTS = st.text(st.sampled_from("the dogß世界🙂é\u0301\u200d\n"), max_size=120)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_deltas_join_to_the_text_and_are_whole_characters(text) -> None:
    tokenizer = BYTES
    deltas = write_all(Detokenizer(tokenizer), tokenizer.encode(text).ids)
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=150))
def test_any_tokens_decode_as_a_whole(ids) -> None:
    """Also bytes that are no UTF-8, which an untrained model writes."""
    assert "".join(write_all(Detokenizer(BYTES), ids)) == BYTES.decode(ids)


def test_spaces_of_a_sentencepiece_tokenizer() -> None:
    tokenizer, rng = sentencepiece(), np.random.default_rng(0)
    euro = [6 + byte for byte in "€".encode()]
    for _ in range(20):
        ids = [int(token) for token in rng.choice([2, 3, 4], 100)]
        ids[50:50] = euro
        assert "".join(write_all(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)
        after = "".join(write_all(Detokenizer(tokenizer, before=2), ids))  # what follows "the" keeps its space
        assert "the" + after == tokenizer.decode([2, *ids])
    assert write_all(Detokenizer(tokenizer), euro) == ["", "", "€", ""]


def test_half_a_character_is_held_back_and_flushed_at_the_end() -> None:
    ids = BYTES.encode("a🙂").ids
    assert len(ids) == 5
    assert write_all(Detokenizer(BYTES), ids) == ["a", "", "", "", "🙂", ""]
    assert write_all(Detokenizer(BYTES), ids[:-1]) == ["a", "", "", "", "\ufffd"]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab世"), max_size=60),
    stops=st.lists(st.text(st.sampled_from("ab世"), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_over_token_boundaries(text, stops) -> None:
    ids = BYTES.encode(text).ids
    detokenizer = Detokenizer(BYTES, stops)
    deltas = write_all(detokenizer, ids)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert detokenizer.stopped == bool(ends)
    joined = "".join(deltas)
    assert text.startswith(joined)
    if not ends:
        assert joined == text
    elif len(set(stops)) == 1:
        assert joined == text[: min(ends)]
    assert not any(stop in joined for stop in stops)
    sent = ""
    for delta in deltas[:-1]:  # nothing was shown that a stop string would have taken back
        sent += delta
        assert joined.startswith(sent)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    ids = [token for character in "xSTYSTOPz" for token in BYTES.encode(character).ids]
    detokenizer = Detokenizer(BYTES, ["STOP"])
    assert [detokenizer.push(token) for token in ids] == ["x", "", "", "STY", "", "", "", "", ""]
    assert detokenizer.stopped


def test_a_stop_string_may_be_as_long_as_a_request() -> None:
    """Looked at for as much of it as there is text, or this takes minutes."""
    detokenizer = Detokenizer(BYTES, ["x" * 500_000] * 16)
    ids = BYTES.encode("xxx").ids
    assert write_all(detokenizer, [*ids, *ids]) == [""] * (2 * len(ids)) + ["xxxxxx"]


def _bytes() -> Tokenizer:
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the dog the dogs abab aabb babab the ends of the dog and others"] * 4, trainer)
    return tokenizer


BYTES = _bytes()  # not a fixture: hypothesis calls a test many times
