"""A training run on disk: numbered checkpoints, each complete or not there, and the log of its steps.

`step-00000100/` is a Hugging Face directory in float32 (so any of them can be exported, or uptrained further) with the
optimizer's state and `state.json` beside it. Nothing is a pickle.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.hf import HuggingFaceCheckpoint
from headfold.export.checkpoints.hf_writer import save_tensors, write_hf
from headfold.export.checkpoints.side_files import read_json
from headfold.export.files import CANNOT_WRITE
from headfold.export.model.decoder import Decoder
from headfold.export.publishing import discard, publish, publish_file, sweep
from headfold.runtime.errors import CheckpointError, InputError

OPTIMIZER, STATE, LOG = "optimizer.safetensors", "state.json", "log.jsonl"
_States = dict[str, dict[str, Tensor]]  # by parameter and name
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered from all processes, on the first one
_EVERYWHERE = StateDictOptions(full_state_dict=True)


@dataclass
class RunState:
    """Where a run is. `identity` is all that decides its course: a run resumes only with the one it began with."""

    identity: dict[str, Any]
    step: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last steps, to tell a spike by
    evaluations: list[dict[str, float]] = field(default_factory=list)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts as `parameter:name`. With several processes all must call it, and only the first gets any."""
    state = cast(_States, get_optimizer_state_dict(model, optimizer, options=_FULL).get("state", {}))
    return {
        f"{parameter}:{name}": value.contiguous()
        for parameter, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's optimizer state back; learning rates are not in it, the schedule knows them.

    Every process reads the file, and keeps the parts that it has under FSDP.

    Raises:
        CheckpointError: the file is missing, damaged, or another model's.
    """
    state = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_EVERYWHERE))
    try:
        with safe_open(path / OPTIMIZER, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged: {error}", where=path / OPTIMIZER, fix=_older(path)) from error
    names = {f"{parameter}:{name}" for parameter, values in state["state"].items() for name in values}
    if names != set(tensors):
        raise CheckpointError("does not belong to this model", where=path / OPTIMIZER, fix=_older(path))
    full: _States = {}
    for name, tensor in tensors.items():
        parameter, _, entry = name.rpartition(":")
        full.setdefault(parameter, {})[entry] = tensor
    set_optimizer_state_dict(model, optimizer, state | {"state": full}, options=_EVERYWHERE)


def _older(path: Path) -> str:
    return f"Delete {path} and resume from the checkpoint before it."


def save_state(
    directory: Path, checkpoint: Checkpoint, optimizer: Mapping[str, Tensor], state: RunState, keep: int
) -> Path:
    """Write `step-N` into the run's directory, then delete all but the newest `keep`.

    Raises:
        CheckpointError: the disk is full or cannot be written; the checkpoints before are as they were.
    """
    target = directory / f"step-{state.step:08}"
    with writing(target.name, directory):
        directory.mkdir(parents=True, exist_ok=True)
        with publish(target, replace=_check_ours) as stage:  # of a run that resumed from before it
            write_hf(stage, checkpoint, torch.float32)
            save_tensors(dict(optimizer), stage / OPTIMIZER)
            (stage / STATE).write_text(json.dumps(vars(state), indent=1) + "\n")
        prune(directory, keep)
    return target


def prune(directory: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`; a run does so when it resumes, too, for a kill may have come before."""
    for old in checkpoints(directory)[:-keep]:
        discard(old)


def _check_ours(target: Path) -> None:
    if not (target / STATE).is_file():
        raise CheckpointError("is no checkpoint of a run", where=target, fix="Move it elsewhere.")


@contextmanager
def writing(what: str, run: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a CheckpointError that says which checkpoint of the run can be resumed from."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        kept = latest(run)
        raise CheckpointError(
            f"cannot write {what}: {error.strerror}",
            where=run,
            fix=f"Free some space, then --resume: {kept.name if kept else 'no checkpoint'} is kept.",
        ) from error


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / STATE).is_file())


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(checkpoints(directory)), None)


def load_state(path: Path, identity: dict[str, Any], decoder: Decoder) -> RunState:
    """Read a checkpoint's weights into the decoder; the optimizer's state is read once there is one.

    Raises:
        InputError: the run was begun with other options, data or models.
        CheckpointError: the checkpoint is damaged.
    """
    content = read_json(path / STATE)
    try:
        state = RunState(**content)
        begun = state.identity
        differing = sorted(k for k in identity.keys() | begun.keys() if identity.get(k) != begun.get(k))
    except (TypeError, AttributeError) as error:
        raise CheckpointError("is damaged", where=path / STATE, fix=_older(path)) from error
    if differing:
        shown = ", ".join(f"{k} was {begun.get(k)!r} and is {identity.get(k)!r}" for k in differing[:3])
        raise InputError(
            f"was begun otherwise: {shown}",
            where=path.parent,
            fix="Resume with the same options, or start a run elsewhere.",
        )
    source = HuggingFaceCheckpoint(path)
    for name, parameter in decoder.state_dict().items():
        parameter.copy_(source.read(name))
    return state


class StepLog:
    """`log.jsonl`: one JSON object per line, each step once even if a run was killed and resumed from before it."""

    def __init__(self, directory: Path, resumed_at: int) -> None:
        self.path = directory / LOG
        with writing(LOG, directory):
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)  # a checkpoint that a kill left in its stage may never be written again
            kept = [line for line in read_log(self.path) if line["step"] <= resumed_at] if resumed_at else []
            text = "".join(json.dumps(line) + "\n" for line in kept)
            publish_file(self.path, lambda stage: stage.write_text(text))
            self._file = self.path.open("ab", buffering=0)

    def write(self, **line: Any) -> None:
        """Append a line; it is given to the system at once, so that only a machine that crashes loses it.

        Raises:
            CheckpointError: the disk is full.
        """
        with writing(LOG, self.path.parent):
            self._file.write((json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
