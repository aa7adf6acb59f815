"""The serving side of headfold: open and check a bundle, run it on an engine, sample, generate. May import plugins only.

Of packages numpy, pydantic, tokenizers and jinja2; onnxruntime and TensorRT each in the one file that runs it; never torch.

from headfold.runtime import load
model = load("bundles/smollm2")
print(model.generate("The capital of France is").text)
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import (
    BundleError,
    BusyError,
    CapacityError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    EngineError,
    HeadfoldError,
    InputError,
    ProviderError,
    VerificationError,
)

if TYPE_CHECKING:
    from headfold.runtime.backend import Backend
    from headfold.runtime.generate import Delta, Generation, Model
    from headfold.runtime.manifest import Manifest
    from headfold.runtime.text import Text

__all__ = [
    "BundleError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "Delta",
    "EngineError",
    "Generation",
    "HeadfoldError",
    "InputError",
    "Model",
    "ProviderError",
    "VerificationError",
    "load",
]


class Scheduling(TypedDict, total=False):
    """How a model shares its engine among those who ask at the same time."""

    slots: int  # prompts that are answered together at most, 16 by default; on a CPU fewer where memory is short
    waiting: int  # prompts that may wait beyond them, 1024 by default; then BusyError
    keep_bytes: int  # of the cache, for calls with `reuse`: 1 GiB by default


def load(
    path: str | PathLike[str],
    *,
    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime",
    provider: str = "cpu",
    threads: int | None = None,
    attention: Attention | None = None,
    check: bool = True,
    draft: str | PathLike[str] | None = None,
    prefill: str | PathLike[str] | None = None,
    **scheduling: Unpack[Scheduling],
) -> "Model":
    """Open a bundle.

    Args:
        path: the bundle's directory.
        backend: "onnxruntime", or "tensorrt" for one of the bundle's engines, which `headfold build` makes.
        provider: of ONNX Runtime: "cpu" or "cuda".
        threads: of the CPU provider; by default one per physical core.
        attention: which TensorRT engine; by default the first that is for this GPU.
        check: compare every file with its SHA-256 first. Leave it on, unless you just did. A large file's is remembered, in
            `$XDG_CACHE_HOME/headfold/sha256`, until it is touched: only the first time is slow.
        draft: a smaller bundle with the same tokenizer, opened likewise: it guesses tokens, which the model checks several at
            once, where that pays. Answers are the same. The model's own bundle must be one of --all-logits.
        prefill: a bundle of the same model that reads the prompts, where its weights do that faster (--weights w8a8 beside int4):
            their first token is its own, and what follows is decoded from its keys and values. ONNX Runtime on the CPU only, and
            at the memory of both.
        scheduling: see `Scheduling`.

    Raises:
        BundleError: the bundle is incomplete, altered, of a newer format, or cannot be loaded.
        ProviderError: onnxruntime or its provider is not available, or cannot run the bundle. There is no silent fallback to the CPU.
        EngineError: the bundle has no engine for this GPU or this TensorRT, or it or its plugin is damaged or missing.
        InputError: less than one thread, an unknown backend, or a draft of other tokens, or for a bundle that cannot check its guesses;
            or a bundle for prompts that is of another model, or cannot write this one's cache.
    """
    from headfold.runtime.generate import Model  # here, so that a command line that only prints help is quick

    if prefill is not None and (backend, provider) != ("onnxruntime", "cpu"):
        raise InputError(
            "another bundle can read prompts only with ONNX Runtime on the CPU", where=prefill, fix="Leave it out."
        )
    shares = draft is not None or prefill is not None  # the cores
    opened = _open(Path(path), backend, provider, threads, attention, check, shares)
    drafting, reading = (
        None if other is None else _open(Path(other), backend, provider, threads, attention, check, shares)
        for other in (draft, prefill)
    )
    return Model(*opened, draft=drafting, prefill=reading, **scheduling)


def _open(
    bundle: Path,
    backend: str,
    provider: str,
    threads: int | None,
    attention: Attention | None,
    check: bool,
    shares: bool,
) -> "tuple[Text, Manifest, Backend[Any]]":
    """The bundle's texts, its manifest and its engine; see `load`."""
    from headfold.runtime.files.known_files import known_files
    from headfold.runtime.manifest import check_files, read_manifest
    from headfold.runtime.text import Text

    if backend not in ("onnxruntime", "tensorrt"):
        raise InputError(f"backend {backend!r} is unknown", fix="headfold knows onnxruntime, tensorrt.")
    if attention is not None and backend != "tensorrt":
        raise InputError("attention chooses a TensorRT engine", fix='Leave it out, or give backend="tensorrt".')
    manifest = read_manifest(bundle)
    if check:
        with known_files(bundle) as digest:
            check_files(bundle, manifest, digest)
    text = Text(bundle)  # first: what a tokenizer takes while it is read, the session takes again
    if backend == "tensorrt":
        from headfold.runtime.tensorrt_session import TensorRTSession

        return text, manifest, TensorRTSession(bundle, manifest, attention)
    try:
        from headfold.runtime.session import OrtSession
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ProviderError("onnxruntime is not installed", fix='Install it: pip install "headfold[ort]".') from error
    return text, manifest, OrtSession(bundle, manifest, provider, threads, shares=shares)


def __getattr__(name: str) -> Any:
    if name in {"Delta", "Generation", "Model"}:
        from headfold.runtime import generate

        return getattr(generate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
