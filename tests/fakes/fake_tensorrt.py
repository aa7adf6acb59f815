"""A TensorRT runtime without a GPU, over a `FakeCuda`, whose engine is a decoder in PyTorch that works on the fake's memory.

Strict where TensorRT would be wrong or undefined: shapes outside the profile, tensors without address or with too little memory
behind it, past and present at different addresses, a capture without a run of the same shapes before it, and the launch of a graph
whose context was changed after the capture.
"""

from enum import IntEnum, IntFlag
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_cuda import FakeCuda, Misuse

from headfold.export.model.decoder import Decoder
from headfold.runtime.manifest import EngineEntry


class EngineValidity(IntEnum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class ILogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)


class FakeTensorRT:
    """Stands in for the module tensorrt_rtx."""

    EngineValidity, EngineInvalidityDiagnostics, ILogger = EngineValidity, EngineInvalidityDiagnostics, ILogger

    def __init__(self, cuda: FakeCuda, entry: EngineEntry, decoder: Decoder, all_logits: bool = False) -> None:
        self.cuda, self.entry, self.decoder, self.all_logits = cuda, entry, decoder, all_logits
        self.__version__ = entry.version
        self.diagnostics = 0
        self.loads = True
        self.capturable = True
        self.contexts: list[Context] = []
        self.names = [spec.name for spec in (*entry.inputs, *entry.outputs)]

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        state = EngineValidity.INVALID if self.diagnostics else EngineValidity.VALID
        return SimpleNamespace(
            get_engine_validity=lambda content: (state, self.diagnostics), deserialize_cuda_engine=self._deserialize
        )

    def _deserialize(self, content: bytes) -> Any:
        if not self.loads:
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
            self.logger.log(ILogger.Severity.WARNING, "not an error")
            return None
        return SimpleNamespace(
            num_io_tensors=len(self.names),
            get_tensor_name=lambda index: self.names[index],
            num_optimization_profiles=len(self.entry.profiles),
            create_execution_context=self._context,
        )

    def _context(self) -> Any:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """An execution context. `runs` has the shape of input_ids and of the mask of every run."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.profile = trt, 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.changes = 0  # voids graphs
        self.primed: int | None = None
        self.runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.trt.cuda._stream(stream)
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        if name not in self.trt.names:
            return False
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changes += 1
        bounds = self.trt.entry.profiles[self.profile].shapes[name]
        if not all(low <= n <= high for low, n, high in zip(bounds.min, shape, bounds.max, strict=True)):
            self.trt.logger.log(ILogger.Severity.ERROR, f"{name} {shape} is outside the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.trt.cuda
        cuda._stream(stream)
        if cuda.capturing and self.primed != self.changes:
            raise Misuse("a capture without a run of the same shapes before it")
        missing = [name for name in self.trt.names if name not in self.addresses]
        missing += [s.name for s in self.trt.entry.inputs if s.name not in self.shapes]
        if missing:
            raise Misuse(f"{missing[0]} is not bound")
        self.primed = self.changes
        at = self.changes

        def work() -> None:
            if self.changes != at:
                raise Misuse("the context was changed after the capture")
            self._compute()

        cuda.record(work)
        return True

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.trt.cuda._at(self.addresses[name], size, name), dtype).reshape(shape)

    @torch.inference_mode()
    def _compute(self) -> None:
        trt = self.trt
        ids_shape, mask_shape = self.shapes["input_ids"], self.shapes["attention_mask"]
        ids, mask = (self._array(n, self.shapes[n], np.int64) for n in ("input_ids", "attention_mask"))
        assert set(np.unique(mask)) <= {0, 1}
        cache = []
        for layer in range(trt.decoder.config.num_hidden_layers):
            pair = []
            for part in ("key", "value"):
                past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
                if self.addresses[past] != self.addresses[present]:
                    raise Misuse(f"{past} and {present} are at different addresses")
                pair.append(torch.from_numpy(self._array(past, self.shapes[past], np.float32)))
            cache.append(tuple(pair))
        if (mask.sum(1) > self.shapes["past_key_values.0.key"][2]).any():
            raise Misuse("more tokens than the cache has room for")
        self.runs.append((ids_shape, mask_shape))
        out = trt.decoder(torch.from_numpy(ids), torch.from_numpy(mask), cache, last_only=not trt.all_logits)
        logits = out.logits.numpy()
        self._array("logits", logits.shape, np.float32)[:] = logits
