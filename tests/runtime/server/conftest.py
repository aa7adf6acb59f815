"""Models that are served: the toy, and one that says what a test has it say."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from script_engine import script_model
from serving import client_of, serving

from headfold.runtime import Model, load
from headfold.runtime.server.settings import Settings


@pytest.fixture(scope="module")
def toy_model(toy: Any) -> Iterator[Model]:
    with load(toy.path, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def client(toy_model: Model) -> Iterator[openai.OpenAI]:
    """Of the toy, which writes nonsense, but the decoder's."""
    with serving({"toy": toy_model}) as address:
        yield client_of(address)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., tuple[openai.OpenAI, Any]]]:
    """Serves a model that says what the test has it say; its client, and its model."""
    with ExitStack() as stack:

        def serve(
            answer: Callable[[str], str] | str, settings: Settings | None = None, name: str = "script", **options: Any
        ) -> Any:
            said = (lambda _: answer) if isinstance(answer, str) else answer
            model = script_model(tmp_path / "script", said, **options)
            stack.callback(model.close)
            return client_of(stack.enter_context(serving({name: model}, settings))), model

        yield serve
