"""Calls are read alike however the text is cut, and what is none stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headfold.runtime.server.protocol.tool_calls import ToolCallReader

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool"}}\n</tool_call>'


def read(pieces: list[str]) -> list[object]:
    """Texts, joined, and calls as name and arguments."""
    reader, found = ToolCallReader(), list[object]()
    for place, piece in enumerate(pieces):
        for one in reader.push(piece, end=place == len(pieces) - 1):
            if isinstance(one, str) and found and isinstance(found[-1], str):
                found[-1] += one
            else:
                found.append(one if isinstance(one, str) else (one.function.name, json.loads(one.function.arguments)))
    return found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no call < at all <tool", ["no call < at all <tool"]),
        (f" so: \n{CALL}\n{CALL}\n", [" so:", ("f", {"x": "</tool"}), ("f", {"x": "</tool"})]),
        (f"{CALL} and so on ", [("f", {"x": "</tool"}), "and so on "]),
        ('<tool_call>{"name": "g"}', [("g", {})]),
        ('<tool_call>{"name": "g", "arguments": "{\\"y\\": 1}"}</tool_call>', [("g", {"y": 1})]),
        ("<tool_call>no json</tool_call> x", ["<tool_call>no json</tool_call> x"]),
        ('<tool_call>{"name": 1}</tool_call>', ['<tool_call>{"name": 1}</tool_call>']),
        ('<tool_call>{"name": "g", "arguments": {"x": NaN}}</tool_call>', None),
        ('<tool_call>{"name": "g", "arguments": {"x": 1e999}}</tool_call>', None),
        ('<tool_call>{"name": "\\ud83d"}</tool_call>', None),
        ('<tool_call>{"name": "g", "arguments": {"x": "\\ud83d"}}</tool_call>', [("g", {"x": "\ud83d"})]),
        (
            '<tool_call>{"name": "g", "arguments": {"x": "</tool_call> "}}</tool_call>.',
            [("g", {"x": "</tool_call> "}), "."],
        ),
        ('<tool_call>{"x": "</tool_call> and so on', None),
        ("<tool_call>" + "[" * 100_000, ["<tool_call>" + "[" * 100_000]),
        ("", []),
        (" \n", [" \n"]),
    ],
)
def test_calls_and_text(text, wanted) -> None:
    wanted = [text] if wanted is None else wanted
    assert read([text]) == wanted
    assert read([text, ""]) == wanted
    if len(text) < 1000:
        assert read([*text, ""]) == wanted


@given(
    st.lists(st.sampled_from(["a", " ", "\n", "<", "<tool_call>", "</tool_call>", CALL, '{"name": "h"}']), max_size=8),
    st.data(),
)
def test_where_the_text_is_cut_changes_nothing(parts, data) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == read([text])
