"""Have something done at a known place of a run: when a line of the log appears, or when gradients are computed.

Nothing here knows how the program is built, only what it prints and that it calls torch. Programs that tests start
import it, so it imports the standard library alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


class Console:
    """A stream that does as the given one, and has `action` done once, after the first line that begins with `start`.

    The program goes on only when the action is over, so what it does is done at that line exactly.
    """

    def __init__(self, stream: Any, start: str, action: Callable[[], object]):
        self.stream, self.start, self.action = stream, start, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        count = self.stream.write(text)
        if self.start and any(line.startswith(self.start) for line in text.splitlines()):
            self.start = ""
            self.stream.flush()
            self.action()
        return count


def at_line(start: str, action: Callable[[], object]) -> None:
    """Have something done after the first line on the console that begins with `start`; may be asked for repeatedly."""
    sys.stdout = Console(sys.stdout, start, action)


def at_backward(action: Callable[[int, Any], Any]) -> None:
    """Call `action(number, loss)` before each backward pass of this process; what it returns is gone back from."""
    import torch

    backward, calls = torch.Tensor.backward, iter(range(sys.maxsize))

    def watched(loss: Any, *args: Any, **options: Any) -> None:
        backward(action(next(calls), loss), *args, **options)

    torch.Tensor.backward = watched  # pyright: ignore[reportAttributeAccessIssue]


def slow_backward(seconds: float) -> None:
    """Make every backward pass take so long."""

    def wait(_: int, loss: Any) -> Any:
        time.sleep(seconds)
        return loss

    at_backward(wait)
