"""A packaged bundle in Triton: its files against Triton's own schema, and its model.py with a stand-in for what only Triton has."""

import importlib.util
import json
import sys
from pathlib import Path

import fake_triton_server
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from schemas import schema

from headfold.export.cli import main
from headfold.runtime import load
from headfold.runtime.triton_server.model import INPUTS


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(toy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "repository"
    result = CliRunner().invoke(main, ["package", str(toy.path), "--for", "triton", "-o", str(path), "--threads", "1"])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def config(repository):
    """Parsed by the messages that Triton's own client has."""
    messages = imported(schema("tritonclient/grpc/model_config_pb2.py"))
    return text_format.Parse((repository / "toy" / "config.pbtxt").read_text(), messages.ModelConfig())


@pytest.fixture
def model(repository, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton_server.module())
    parameters = {key: {"string_value": value.string_value} for key, value in config.parameters.items()}
    served = imported(repository / "toy" / "1" / "model.py").TritonPythonModel()
    served.initialize(
        {
            "model_config": json.dumps({"parameters": parameters}),
            "model_repository": str(repository / "toy"),
            "model_version": "1",
        }
    )
    yield served
    served.finalize()


def asked(model, **given):
    request = fake_triton_server.request(INPUTS, **given)
    model.execute([request])
    assert request.sender.final.wait(60)
    return request.sender.responses


def test_the_configuration_is_triton_s(config) -> None:
    assert (config.name, config.backend, config.max_batch_size) == ("toy", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert {one.name: list(one.dims) for one in config.input} == {name: dims for name, (_, dims) in INPUTS.items()}
    assert all(one.optional for one in config.input)
    assert config.parameters["threads"].string_value == "1"


def test_it_answers_as_the_bundle_does(model, toy) -> None:
    alone = load(toy.path, threads=1).generate("the quick", max_new_tokens=12)
    (whole,) = asked(model, text_input="the quick", max_tokens=12)
    assert whole.outputs == {"text_output": alone.text, "finish_reason": alone.finish_reason}
    parts = asked(model, text_input="the quick", max_tokens=12, stream=True)
    assert "".join(part.outputs["text_output"] for part in parts) == alone.text
    assert [bool(part.outputs["finish_reason"]) for part in parts] == [False] * (len(parts) - 1) + [True]


def test_many_requests_at_once_each_get_their_own(model, toy) -> None:
    texts = [f"the {word}" for word in ("quick", "brown", "fox", "jumps", "over")] * 4
    requests = [fake_triton_server.request(INPUTS, text_input=text, max_tokens=8) for text in texts]
    model.execute(requests)
    with load(toy.path, threads=1) as lone:
        for text, request in zip(texts, requests, strict=True):
            assert request.sender.final.wait(60)
            assert request.sender.responses[0].outputs["text_output"] == lone.generate(text, max_new_tokens=8).text


def test_messages_sampling_and_stop_words(model, toy) -> None:
    messages = [{"role": "user", "content": "hi"}]
    options = {"temperature": 0.5, "top_k": 5, "top_p": 0.75, "seed": 7}
    alone = load(toy.path, threads=1).generate(messages, max_new_tokens=9, stop=["zz"], **options)
    (one,) = asked(model, messages=json.dumps(messages), max_tokens=9, stop_words=["zz"], **options)
    assert one.outputs["text_output"] == alone.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 3}, "neither or both of text_input and messages"),
        ({"messages": "[", "max_tokens": 3}, "messages is no JSON"),
        ({"text_input": "a", "temperature": -1.0}, "temperature is -1.0"),
        ({"text_input": "a", "max_tokens": 1 << 20}, "over the bundle's capacity"),
        ({"text_input": ["a", "b"]}, "text_input has 2 elements"),
    ],
)
def test_what_cannot_be_answered_is_said(given, message, model) -> None:
    (response,) = asked(model, **given)
    assert message in str(response.error)


def test_a_cancelled_request_ends(model) -> None:
    request = fake_triton_server.request(INPUTS, text_input="the quick", max_tokens=50, stream=True)
    request.sender.cancelled = True
    model.execute([request])
    assert request.sender.final.wait(60)
    assert "cancelled" in str(request.sender.responses[-1].error)
