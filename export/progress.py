"""Progress of long steps: a live bar on a terminal, plain lines in a log, nothing when quiet. Always on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[int], None]


class Reporter:
    """Tells a person what is going on. `step` is a context manager that yields a function to advance by some units."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
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
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda units: progress.advance(task, units)
        else:
            yield lambda _: None
        self.note(f"{title}: {time.perf_counter() - start:.1f} s")

    def note(self, line: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(line, markup=False, soft_wrap=True)
