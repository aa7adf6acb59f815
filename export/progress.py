"""Progress of long steps: a live bar on a terminal, plain lines in a log, nothing when quiet. Always on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]
_LOG_SECONDS = 30  # between lines of a log


class Reporter:
    """Tells a person what is going on. `step` is a context manager that yields a function to advance by some units."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self._live: Progress | None = None
        self.console = console or Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else 110)
        self.quiet = quiet

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Announce a step of `total` units (unknown if None); on leaving, say how long it took."""
        start = time.perf_counter()
        if self.quiet:
            yield lambda _: None
            return
        if self.console.is_terminal:
            with self._bars(BarColumn(), TimeElapsedColumn()) as progress:
                task = progress.add_task(title, total=total)
                try:
                    yield lambda units: progress.advance(task, units)
                finally:
                    progress.remove_task(task)
        else:
            yield lambda _: None
        self.note(f"{title}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def training(self, steps: int, done: int, tokens_per_step: int) -> Iterator[Callable[[float], None]]:
        """Progress of a training run: yields a function to call with the loss after each step.

        Shows step, loss, tokens per second since the last line, and the time left; in a log a line every half minute.
        """
        start = shown = time.perf_counter()
        step, at = done, done
        if self.quiet:
            yield lambda _: None
            return

        def line(loss: float, now: float) -> str:
            rate = (step - at) * tokens_per_step / max(now - shown, 1e-9)
            left = (now - start) / max(step - done, 1) * (steps - step)
            return f"step {step}/{steps}: loss {loss:.4f}, {rate:,.0f} tokens/s, {_duration(left)} left"

        if self.console.is_terminal:
            with self._bars(BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
                task = progress.add_task("train", total=steps, completed=done)

                def update(loss: float) -> None:
                    nonlocal step, at, shown
                    step, now = step + 1, time.perf_counter()
                    if now - shown > 1:  # a steadier rate than that of one step
                        progress.update(task, description=line(loss, now).rpartition(",")[0])
                        at, shown = step, now
                    progress.update(task, completed=step)

                yield update
        else:

            def update(loss: float) -> None:
                nonlocal step, at, shown
                step, now = step + 1, time.perf_counter()
                if now - shown > _LOG_SECONDS:
                    self.note(line(loss, now))
                    at, shown = step, now

            yield update
        seconds = time.perf_counter() - start
        rate = (step - done) * tokens_per_step / max(seconds, 1e-9)
        self.note(f"trained {step - done} steps in {_duration(seconds)}, {rate:,.0f} tokens/s")

    @contextmanager
    def _bars(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """The live display. A console of rich 14.0 has only one, so a step within a step adds its bar to that."""
        if self._live is not None:
            yield self._live
            return
        with Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True) as self._live:
            try:
                yield self._live
            finally:
                self._live = None

    def note(self, line: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(line, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy narrates; our report says it shorter."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
