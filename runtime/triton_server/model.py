"""A bundle as a model of NVIDIA Triton's Python backend: text in, text out, in parts if asked; requests are decoded together.

Only Triton has the module `triton_python_backend_utils`; see `model.py` in https://github.com/triton-inference-server/python_backend.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from headfold.runtime import load
from headfold.runtime.errors import HeadfoldError, InputError
from headfold.runtime.generate import Model, Options
from headfold.runtime.scheduling.answers import Answers

INPUTS = {  # name: Triton's type and shape; a request without the optional ones gets what the bundle says
    "text_input": ("TYPE_STRING", [1]),
    "messages": ("TYPE_STRING", [1]),  # JSON, instead of text_input
    "max_tokens": ("TYPE_INT32", [1]),
    "temperature": ("TYPE_FP32", [1]),
    "top_p": ("TYPE_FP32", [1]),
    "top_k": ("TYPE_INT32", [1]),
    "seed": ("TYPE_UINT64", [1]),
    "stop_words": ("TYPE_STRING", [-1]),
    "stream": ("TYPE_BOOL", [1]),
}
OUTPUTS = {
    "text_output": ("TYPE_STRING", [1]),
    "finish_reason": ("TYPE_STRING", [1]),  # empty while more is to come
}
PARAMETERS = ("backend", "provider", "attention", "threads")  # of `load`, in config.pbtxt; an empty one is not given
BUNDLE = "bundle"  # beside model.py
_OPTIONS = {"max_tokens": "max_new_tokens", "stop_words": "stop"}  # our names of those that have another
_ASKING = 64  # requests that wait for their texts at a time; the scheduler decides which are decoded


class TritonPythonModel:
    """Triton makes one for each instance of the model, and calls these three."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle. `args`: see Triton. Raises HeadfoldError, which Triton shows and does not serve the model."""
        import triton_python_backend_utils as triton  # exists in Triton only

        self._triton = triton
        parameters = json.loads(args["model_config"]).get("parameters", {})
        given: dict[str, Any] = {
            name: parameters[name]["string_value"]
            for name in PARAMETERS
            if parameters.get(name, {}).get("string_value")
        }
        if "threads" in given:
            given["threads"] = int(given["threads"])
        self._model: Model = load(Path(args["model_repository"]) / args["model_version"] / BUNDLE, **given)
        self._asking = ThreadPoolExecutor(_ASKING, "headfold-triton")

    def execute(self, requests: list[Any]) -> None:
        """Begin to answer; responses go to each request's sender, since the model is decoupled."""
        for request in requests:
            self._asking.submit(self._answer, request, request.get_response_sender())

    def finalize(self) -> None:
        """Triton unloads the model: what is being answered ends with an error."""
        self._model.close()
        self._asking.shutdown()

    def _answer(self, request: Any, sender: Any) -> None:
        final = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            self._send(request, sender)
        except Exception as error:  # Triton hands it to whoever asked; nobody else could see it in this thread
            text = str(error) if isinstance(error, HeadfoldError) else f"{type(error).__name__}: {error}"
            sender.send(self._triton.InferenceResponse(error=self._triton.TritonError(text)))
        sender.send(flags=final)

    def _send(self, request: Any, sender: Any) -> None:
        given = {name: value for name in INPUTS if (value := self._input(request, name)) is not None}
        stream = bool(given.pop("stream", False))
        with self._model.generate(_prompt(given), stream=True, **_options(given)) as answers:
            if stream:
                for delta in self._until_cancelled(answers, sender):
                    if delta.text or delta.finish_reason:
                        sender.send(self._response(delta.text, delta.finish_reason))
                return
            deltas = list(self._until_cancelled(answers, sender))
            sender.send(self._response("".join(delta.text for delta in deltas), deltas[-1].finish_reason))

    def _until_cancelled(self, answers: Answers, sender: Any) -> Any:
        for delta in answers:
            if sender.is_cancelled():
                raise InputError("the request was cancelled", fix="Ask again.")
            yield delta

    def _input(self, request: Any, name: str) -> Any:
        tensor = self._triton.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        values = [value.decode() if isinstance(value, bytes) else value for value in tensor.as_numpy().ravel().tolist()]
        if INPUTS[name][1] == [-1]:
            return values
        if len(values) != 1:
            raise InputError(f"{name} has {len(values)} elements", fix="Give one.")
        return values[0]

    def _response(self, text: str, reason: str | None) -> Any:
        outputs = {"text_output": text, "finish_reason": reason or ""}
        tensors = [self._triton.Tensor(name, np.array([value.encode()], np.object_)) for name, value in outputs.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)


def _prompt(given: dict[str, Any]) -> Any:
    """Takes text or messages out of what was given."""
    text, messages = given.pop("text_input", None), given.pop("messages", None)
    if (text is None) == (messages is None):
        raise InputError("neither or both of text_input and messages were given", fix="Give one of them.")
    if messages is None:
        return text
    try:
        return json.loads(messages)
    except ValueError as error:
        raise InputError(
            f"messages is no JSON: {error}", fix="Give a list of objects with role and content."
        ) from error


def _options(given: dict[str, Any]) -> Options:
    return cast(Options, {_OPTIONS.get(name, name): value for name, value in given.items()})
