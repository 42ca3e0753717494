"""How long the stages of a trial take.

Decides how seconds are added up by the name of a stage. Knows nothing of what the stages are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageClock:
    """Adds up seconds by name, read from the function `now`, and tells `beat` of each beginning."""

    def __init__(self, now: Callable[[], float], beat: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._beat = beat

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times what happens within, also where it fails."""
        self._beat()
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start
