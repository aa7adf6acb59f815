"""The part of Triton's module `triton_python_backend_utils` that a decoupled model uses, and one that asks such a model."""

import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

FINAL = 1
DTYPES = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_UINT64": np.uint64,
    "TYPE_BOOL": np.bool_,
}


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy()[0].decode() for tensor in output_tensors or []}
        self.error = error


class Sender:
    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.final, self.cancelled = threading.Event(), False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response after the last one"
        if response is not None:
            self.responses.append(response)
        if flags & FINAL:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors, self.sender = tensors, Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


def module() -> ModuleType:
    made: Any = ModuleType("triton_python_backend_utils")
    made.Tensor, made.InferenceResponse, made.TritonError = Tensor, InferenceResponse, TritonError
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    made.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.tensors[name]) if name in request.tensors else None
    )
    return made


def request(kinds: Mapping[str, tuple[str, list[int]]], **given: Any) -> Request:
    """As Triton makes one of what a client sends: strings are bytes."""
    arrays = {}
    for name, value in given.items():
        values = [
            item.encode() if isinstance(item, str) else item for item in (value if isinstance(value, list) else [value])
        ]
        arrays[name] = np.array(values, DTYPES[kinds[name][0]])
    return Request(arrays)
