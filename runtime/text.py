"""Text in and out: the bundle's tokenizer and chat template, and turning tokens into text one by one."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from headfold.runtime.errors import BundleError, InputError

Messages = Sequence[Mapping[str, str]]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNFINISHED = "\ufffd"  # what a tokenizer decodes the bytes of half a character to
_SETTLE = 32  # tokens decoded anew with every further one, at most; but see Detokenizer


class Text:
    """Tokenizer and chat template of a bundle. Both may be missing: using a missing one is an InputError."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.settings = read_json(bundle / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(bundle / "tokenizer.json")
        self._template = self._read_template()

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` can be used."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself.

        Raises:
            InputError: the bundle has none.
        """
        if self._tokenizer is None:
            raise InputError(
                "the bundle has no tokenizer",
                where=self.bundle,
                fix="Give token ids, or export from a checkpoint with one.",
            )
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt. tokenizer.json says which special tokens go around it, as in transformers 5."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens itself."""
        return self._encode(self.chat_prompt(messages), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self.tokenizer
        try:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # of a str that has no UTF-8
            raise InputError("the text holds half a surrogate pair", fix="Decode it as UTF-8.") from error

    def chat_prompt(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model was trained on.

        Raises:
            InputError: no template, malformed messages, or the template refuses them.
        """
        if self._template is None:
            raise InputError("the bundle has no chat template", where=self.bundle, fix="Give a plain prompt.")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or any(
                not isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise InputError(
                    f"message {index} is malformed",
                    fix='A message is {"role": "system", "user" or "assistant", "content": text}.',
                )
        special = {name: token for name in _SPECIAL if (token := _content(self.settings.get(name))) is not None}
        absent = {"tools": None, "documents": None}  # as transformers passes them
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **absent, **special
            )
        except Exception as error:  # a template is a program and can fail like one
            raise InputError(
                f"the chat template refuses the messages: {error}", where=self.bundle, fix="Correct the messages."
            ) from error

    def _read_template(self) -> jinja2.Template | None:
        file, source = self.bundle / "chat_template.jinja", self.settings.get("chat_template")
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # several, by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if source is None:
            return None
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"its chat template is broken: {error}", where=self.bundle, fix="Export the bundle again."
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says, for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 jinja's own way

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Detokenizer:
    """Turns one sequence's tokens into text as they come: never half a character, never the beginning of a stop string.

    Tokens are decoded together with the one before them, because a leading space may depend on it; and again with each further
    one, because a character may need several. Once about 32 of them have come and the last one is whole, they are settled.
    (tokenizers has a DecodeStream, which raises an exception for bytes that are no UTF-8; models do write such.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: int | None = None) -> None:
        """`before` is the prompt's last token. `stop` strings are not empty."""
        self._tokenizer, self._stop = tokenizer, stop
        self._context: list[int] = [] if before is None or not self._is_whole(before) else [before]
        self._ids: list[int] = []  # since the context
        self._settled = ""  # text of the tokens before `_ids`
        self._sent = 0  # characters that were returned
        self.stopped = False  # a stop string was found; the text ends before it

    def push(self, token: int | None) -> str:
        """Add a token, and return the text that is certain by now; None flushes what was held back at the end."""
        if self.stopped:
            return ""
        if token is not None:
            self._ids.append(token)
        whole = self._settled + self._decode(self._context + self._ids)[len(self._decode(self._context)) :]
        if len(self._ids) >= _SETTLE and self._is_whole(self._ids[-1]):
            self._settled, self._context, self._ids = whole, self._ids[-1:], []
        end = len(whole)
        longest = max(map(len, self._stop), default=0)
        found = [at for stop in self._stop if (at := whole.find(stop, max(0, self._sent - longest))) >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif token is not None:
            end = len(whole.rstrip(_UNFINISHED))
            held = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n], 0, end))
            end -= max(held, default=0)
        new = whole[self._sent : end]
        self._sent += len(new)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _is_whole(self, token: int) -> bool:
        """Whether the token is text by itself, so that what follows it can be decoded with it alone."""
        text = self._decode([token])
        return bool(text) and _UNFINISHED not in text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the bundle, empty if there is no such file.

    Raises:
        BundleError: it is something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"is not JSON: {error}", where=path, fix="Export the bundle again.") from error
    if not isinstance(content, dict):
        raise BundleError("is no JSON object", where=path, fix="Export the bundle again.")
    return content


def _read_tokenizer(path: Path) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"is no tokenizer: {error}", where=path, fix="Export the bundle again.") from error
    tokenizer.no_truncation()  # settings of its training, which would cut a prompt or pad it
    tokenizer.no_padding()
    return tokenizer


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that has it as `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
