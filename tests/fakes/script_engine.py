"""A model that says what a test has it say: to a conversation in ChatML, the answer that a function gives to its prompt's text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import least_bundle
from token_engine import TokenEngine
from toy_tokenizer import toy_tokenizer

from headfold.export.bundle.writer import manifest_of, write_json
from headfold.runtime.generate import Model
from headfold.runtime.text import Text

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nAnswer, or call: <tool_call>{}</tool_call> with {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START = "<|im_start|>assistant\n"


class ScriptEngine(TokenEngine):
    """`answer` is given the prompt's text, up to the answer; a prompt that is none of a chat goes on with "!"."""

    vocab = 300

    def __init__(self, answer: Callable[[str], str], **options: Any) -> None:
        super().__init__(capacity=options.pop("capacity", 4000), **options)
        self.answer, self.tokenizer = answer, toy_tokenizer(self.vocab)
        self.prompts: list[str] = []

    def next_token(self, context: Any) -> int:
        tokens, start = context.tolist(), self.tokenizer.encode(START).ids
        places = [i for i in range(len(tokens)) if tokens[i : i + len(start)] == start]
        if not places:
            return int(self.tokenizer.token_to_id("!"))
        prompt = self.tokenizer.decode(tokens[: places[-1]], skip_special_tokens=False)
        said = len(tokens) - places[-1] - len(start)
        if not said:
            self.prompts.append(prompt)
        answer = self.tokenizer.encode(self.answer(prompt)).ids
        return answer[said] if said < len(answer) else 0


def script_model(directory: Path, answer: Callable[[str], str], template: str = TEMPLATE, **options: Any) -> Model:
    """The model, of a bundle that holds what is not the engine's."""
    scheduling = {name: options.pop(name) for name in ("slots", "waiting") if name in options}
    engine = ScriptEngine(answer, **options)
    directory.mkdir()
    manifest = least_bundle.fill(directory, engine.vocab)
    engine.tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    cache = manifest.cache.model_copy(update={"capacity": engine.capacity})
    manifest = manifest.model_copy(update={"cache": cache})
    write_json(
        directory / "manifest.json", manifest_of(directory, **manifest.model_dump(exclude={"files"})).model_dump()
    )
    return Model(Text(directory), manifest, engine, **scheduling)
