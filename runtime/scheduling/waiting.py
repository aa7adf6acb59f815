"""The requests that no slot has taken yet: bounded, and taken from the calls in turn, so that a long list stops nobody."""

from collections import deque
from collections.abc import Callable, Sequence

from headfold.runtime.errors import BusyError
from headfold.runtime.scheduling.request import Request


class Waiting:
    """Requests of each call in its order; the calls in turn. Not for several threads at once."""

    def __init__(self, most: int) -> None:
        """New calls are refused where `most` requests wait already."""
        self._most = most
        self._calls: deque[deque[Request]] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._calls))

    def add(self, call: Sequence[Request]) -> None:
        """Let a call's requests wait. Raises BusyError: too many do."""
        if len(self) >= self._most:
            raise BusyError(f"{len(self)} prompts wait already", fix="Try again later.")
        self._calls.append(deque(call))

    def take(self, fits: Callable[[Request], bool]) -> Request | None:
        """The next request that fits, if any; the call it is of is the last in turn then."""
        for call in self._calls:
            if fits(call[0]):
                request = call.popleft()
                self._calls.remove(call)
                if call:
                    self._calls.append(call)
                return request
        return None

    def drop_over(self) -> None:
        """Let go of those that ended while they waited."""
        kept = (deque(request for request in call if not request.end_if_over()) for call in self._calls)
        self._calls = deque(call for call in kept if call)

    def fail(self, error: Exception) -> None:
        """End all of them."""
        for call in self._calls:
            for request in call:
                request.fail(error)
        self._calls.clear()
