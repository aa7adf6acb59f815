#!/usr/bin/env python3
"""Feed headfold damaged and hostile files of eleven kinds. Each is understood, or refused by a HeadfoldError; all else is a failure.

Run it as `scripts/fuzz`, which makes the environment. Inputs are drawn from numbered seeds, so they are the same everywhere.
Failures are grouped by their cause, each with a seed: `scripts/fuzz --kind KIND --seed SEED` runs that one again, and keeps its
files. Exit code 1 if there was one.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # an adapter may name any base
import transformers  # noqa: F401 now, and not in each process

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))
from fuzzing import subjects
from fuzzing.attempt import Failure, Tries, bound_memory, serve
from fuzzing.kinds import KINDS

WALL_SECONDS = 20  # of one input; others may have the processor, so this only ends what does not end
_START_SECONDS = 60
_context = multiprocessing.get_context("fork")  # what is imported above takes seconds, and is imported once
Input = tuple[str, int]  # kind and seed


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=4500, help="how many, of all kinds together")
    arguments.add_argument(
        "--kind", choices=KINDS, action="append", help="only of this kind; may be given several times"
    )
    arguments.add_argument("--first", type=int, default=0, help="the first seed of each kind")
    arguments.add_argument(
        "--seed", type=int, help="run this input of one kind again, show what fails, and keep its files"
    )
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = arguments.parse_args()
    kinds = options.kind or list(KINDS)
    if options.seed is not None and len(kinds) != 1:
        arguments.error("--seed needs one --kind")
    directory = Path(tempfile.mkdtemp(prefix="headfold-fuzz-"))
    made = _context.Process(
        target=subjects.make, args=(directory / "valid",)
    )  # apart: it starts threads, and a fork has none
    made.start()
    made.join()
    if made.exitcode != 0:
        return 3
    if options.seed is not None:
        return replay(kinds[0], options.seed, directory)
    inputs = [(kinds[i % len(kinds)], options.first + i // len(kinds)) for i in range(options.inputs)]
    failures: dict[str, list[tuple[Input, Failure]]] = defaultdict(list)
    start = time.monotonic()
    for count, (tried, found) in enumerate(run(inputs, options.processes, directory), 1):
        for failure in found:
            failures[f"{tried[0]}: {failure.cause}"].append((tried, failure))
        if count % 1000 == 0:
            print(
                f"{count:,} inputs, {time.monotonic() - start:.0f} s, {len(failures)} causes",
                file=sys.stderr,
                flush=True,
            )
    shutil.rmtree(directory)
    report(failures, len(inputs))
    return 1 if failures else 0


def report(failures: dict[str, list[tuple[Input, Failure]]], inputs: int) -> None:
    """Each cause with its number of inputs, one of which can be run again."""
    for cause, found in sorted(failures.items(), key=lambda entry: -len(entry[1])):
        (kind, seed), failure = found[0]
        lines = [line for line in failure.text.splitlines() if line.strip()][-3:]
        print(f"{len({tried for tried, _ in found})} x {cause}\n    scripts/fuzz --kind {kind} --seed {seed}")
        print(*(f"    {line[:200]}" for line in lines), sep="\n")
    failed = len({tried for found in failures.values() for tried, _ in found})
    print(f"{inputs:,} inputs, {failed:,} failed, {len(failures)} causes")


def replay(kind: str, seed: int, directory: Path) -> int:
    """Try one input here, and leave its files."""
    tries = Tries(directory / "valid", directory / "tried")
    bound_memory()
    failures = tries.attempt(kind, seed, restore=False)
    for failure in failures:
        print(failure.cause, failure.text, sep="\n")
    print(f"{len(failures)} failures; the files are in {directory / 'tried' / (KINDS[kind].subject or 'alone')}")
    return 1 if failures else 0


class Worker:
    """A process that tries inputs, started anew when one has ended it."""

    def __init__(self, valid: Path, directory: Path) -> None:
        self._valid, self._directory = valid, directory
        self.busy: Input | None = None
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it is ready."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self.connection: Connection
        self.connection, theirs = _context.Pipe()
        self._process: ForkProcess = _context.Process(
            target=serve, args=(theirs, self._valid, self._directory), daemon=True
        )
        self._process.start()
        theirs.close()
        if not self.connection.poll(_START_SECONDS):
            raise RuntimeError("a process of the fuzzer does not start")
        self.connection.recv()

    def give(self, task: Input) -> None:
        """Let it try an input."""
        self.busy, self.deadline = task, time.monotonic() + WALL_SECONDS
        self.connection.send(task)

    def answer(self) -> list[Failure] | None:
        """What came of it, or None while it is at work."""
        if self.connection.poll():
            try:
                found: list[Failure] = self.connection.recv()
                return found
            except EOFError:
                self._process.join()
                return self._ended(f"the process ended with {self._process.exitcode}")
        return self._ended(f"over {WALL_SECONDS} s by the clock") if time.monotonic() > self.deadline else None

    def _ended(self, what: str) -> list[Failure]:
        self._process.kill()
        self._process.join()
        self.start()
        return [Failure(what, "run it again to see where")]


def run(inputs: Iterable[Input], processes: int, directory: Path) -> Iterator[tuple[Input, list[Failure]]]:
    """Try all inputs, and tell of each as it is done."""
    waiting = iter(inputs)
    workers = [Worker(directory / "valid", directory / f"worker{i}") for i in range(processes)]
    while True:
        for worker in workers:
            if worker.busy is None and (task := next(waiting, None)) is not None:
                worker.give(task)
        busy = [worker for worker in workers if worker.busy is not None]
        if not busy:
            return
        wait([worker.connection for worker in busy], timeout=1)
        for worker in busy:
            if (found := worker.answer()) is not None:
                tried, worker.busy = worker.busy, None
                assert tried is not None
                yield tried, found


if __name__ == "__main__":
    sys.exit(main())
