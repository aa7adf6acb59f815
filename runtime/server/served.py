"""The models of a server, by name."""

import asyncio
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from headfold.runtime.errors import InputError
from headfold.runtime.generate import Model
from headfold.runtime.server.metrics import Meters
from headfold.runtime.server.protocol.refusals import Refused
from headfold.runtime.server.protocol.responses import ModelCard
from headfold.runtime.server.protocol.token_texts import TokenTexts
from headfold.runtime.server.protocol.tool_calls import OPEN

_PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


class Served:
    """One model, under its name."""

    def __init__(self, name: str, model: Model, meters: Meters) -> None:
        self.name, self.model, self.meters, self.created = name, model, meters, int(time.time())
        self.embedding = 0  # requests for embeddings that are at work
        self._writes_calls: bool | None = None

    @property
    def card(self) -> ModelCard:
        """As /v1/models has it."""
        return ModelCard(id=self.name, created=self.created, max_model_len=self.model.capacity)

    @cached_property
    def texts(self) -> TokenTexts:
        """Its tokens; InputError if it has no tokenizer."""
        return TokenTexts(self.model.tokenizer)

    async def writes_calls(self) -> bool:
        """Whether its chat template asks for tool calls in the form that ToolCallReader reads."""
        if self._writes_calls is None:
            conversation = [{"role": "user", "content": "x"}]
            try:
                asked = await asyncio.to_thread(self.model.chat_prompt, conversation, tools=[_PROBE])
            except InputError:  # as it will say of the request itself
                return False
            self._writes_calls = OPEN in asked
        return self._writes_calls


class Models:
    """All of them."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.meters = Meters(models)
        self.all = {name: Served(name, model, self.meters) for name, model in models.items()}

    def find(self, name: str | None) -> Served:
        """The one of that name; if there is one only, it needs none."""
        if name is None and len(self.all) == 1:
            return next(iter(self.all.values()))
        if name is None:
            raise Refused(400, "Name a model: this server has several.", param="model")
        if name not in self.all:
            known = ", ".join(sorted(self.all))
            raise Refused(
                404, f"The model '{name}' does not exist; there are: {known}.", param="model", code="model_not_found"
            )
        return self.all[name]


def names_of(bundles: list[Path], given: list[str]) -> list[str]:
    """What each bundle is called: as given, or like its directory.

    Raises:
        InputError: not as many names as bundles, or two alike.
    """
    if given and len(given) != len(bundles):
        raise InputError(
            f"{len(given)} names are given for {len(bundles)} bundles", fix="Give each one --name, or none."
        )
    names = given or [path.resolve().name for path in bundles]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two bundles are called {min(twice)}", fix="Give each one its --name.")
    return names
