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


class Text:
    """Tokenizer and chat template of a bundle. Both may be missing: using a missing one is an InputError."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.settings: dict[str, Any] = read_json(bundle / "tokenizer_config.json")
        self._tokenizer: Tokenizer | None = None
        path = bundle / "tokenizer.json"
        if path.is_file():
            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises plain Exception
                raise BundleError(f"is no tokenizer: {error}", where=path, fix="Export the bundle again.") from error
        self._template = self._read_template()

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
        """Token ids of a plain prompt, with the special tokens the tokenizer puts around it."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens itself."""
        return list(self.tokenizer.encode(self.chat_prompt(messages), add_special_tokens=False).ids)

    def chat_prompt(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model was trained on.

        Raises:
            InputError: no template, malformed messages, or the template refuses them.
        """
        if self._template is None:
            raise InputError("the bundle has no chat template", where=self.bundle, fix="Give a plain prompt.")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
                raise InputError(f"{message!r} is no message", fix='A message is {"role": ..., "content": ...}.')
        special = {
            name: _content(self.settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        special = {name: value for name, value in special.items() if value is not None}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **special)
        except jinja2.TemplateError as error:
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
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"its chat template is broken: {error}", where=self.bundle, fix="Export the bundle again."
            ) from error


class Detokenizer:
    """Turns one sequence's tokens into text as they come: never half a character, never the beginning of a stop string.

    `push` returns the text that is certain by now; `text` is all of it so far. Once `stopped` is true, a stop string was found, and
    the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = 0  # tokens before it are decoded for good
        self._decoded = ""  # text of the tokens before `_start`
        self.text, self.stopped = "", False

    def push(self, token: int | None) -> str:
        """Add a token; None flushes what was held back at the end."""
        if self.stopped:
            return ""
        if token is not None:
            self._ids.append(token)
        whole = self._decoded + self._tail()
        incomplete = whole.endswith("\ufffd")  # bytes of a character that is not finished
        if not incomplete and len(self._ids) - self._start > 32:
            self._settle(whole)
        for stop in self._stop:
            at = whole.find(stop, max(0, len(self.text) - len(stop)))
            if at >= 0:
                self.stopped, whole = True, whole[:at]
        end = len(whole)
        if token is not None and not self.stopped:
            end = len(whole.rstrip("\ufffd")) if incomplete else end
            held = (n for s in self._stop for n in range(len(s) - 1, 0, -1) if whole[:end].endswith(s[:n]))
            end -= max(held, default=0)
        new = whole[len(self.text) : end]
        self.text += new
        return new

    def _tail(self) -> str:
        """Text of the tokens that are not settled; decoded with one token of context, as leading spaces depend on it."""
        context = self._ids[max(0, self._start - 1) : self._start]
        text = str(self._tokenizer.decode(context + self._ids[self._start :], skip_special_tokens=True))
        return text[len(self._tokenizer.decode(context, skip_special_tokens=True)) :]

    def _settle(self, whole: str) -> None:
        """Decode only what is new from here on, so that a long answer does not cost its length squared."""
        self._decoded, self._start = whole, len(self._ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the bundle, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"is not JSON: {error}", where=path, fix="Export the bundle again.") from error
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that has it as `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
