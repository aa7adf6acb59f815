"""Errors a user can cause. Each is one line: what is wrong, where, and how to fix it.

A command line prints them without a traceback and exits with `exit_code`: 2 for bad usage or input, 1 for a failed
verification. They quote files that nobody vouches for, so a line has a bounded length and no terminal escapes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 600  # characters of each of the three parts


def printable(text: str, most: int = _LONGEST) -> str:
    """The text on one line, its middle left out where it is long, with U+FFFD for what a terminal would obey instead of show."""
    if len(text) > 4 * most:  # of what may be a whole file, no more is looked at
        text = f"{text[: 2 * most]}…{text[-2 * most :]}"
    line = " ".join(text.split())
    if len(line) > most:
        line = f"{line[: most * 2 // 3]}…{line[-most // 3 :]}"
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


class HeadfoldError(Exception):
    """What is wrong, where it is (a path, a tensor, a field), and what the user can do about it."""

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = printable(what) if where is None else f"{printable(str(where))}: {printable(what)}"
        super().__init__(f"{line}. {printable(fix)}" if fix else line)


@contextmanager
def located(where: object) -> Iterator[None]:
    """An error inside the block that does not say where is of `where`."""
    try:
        yield
    except HeadfoldError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, fix=error.fix) from error


class ConfigError(HeadfoldError):
    """A model configuration that headfold does not implement, or that contradicts itself."""


class CheckpointError(HeadfoldError):
    """A checkpoint that cannot be read, or whose tensors are not exactly the ones its configuration implies."""


class BundleError(HeadfoldError):
    """A bundle that is incomplete, altered, or of another format version."""


class ProviderError(HeadfoldError):
    """The execution provider asked for is not available, or cannot run this bundle."""


class KernelError(HeadfoldError):
    """Attention kernels that cannot be compiled, or that this GPU cannot run."""


class EngineError(HeadfoldError):
    """A TensorRT engine that is missing, damaged, or not for this GPU or this TensorRT."""


class CapacityError(HeadfoldError):
    """More tokens than the KV cache holds."""


class InputError(HeadfoldError):
    """A prompt, message list or sampling parameter that cannot be used."""


class ClosedError(InputError):
    """A model that was closed, before it was asked or before it had answered."""


class BusyError(HeadfoldError):
    """Too many prompts wait for this model already."""


class DeadlineError(HeadfoldError):
    """An answer that was not complete in the time it was given."""


class BuildError(HeadfoldError):
    """A graph, option or machine from which no right engine can be built."""


class VerificationError(HeadfoldError):
    """The exported graph does not compute what PyTorch computes."""

    exit_code = 1


class DataError(HeadfoldError):
    """Training data that is missing, unreadable, empty, or too short."""


class TokenizerMismatchError(HeadfoldError):
    """Teacher and student do not mean the same token by the same id, so their distributions cannot be compared."""


class TrainingError(HeadfoldError):
    """Training diverged: the loss is not finite, or rose too far at once."""

    exit_code = 1
