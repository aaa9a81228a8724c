"""What a process reaches that it should not: an audit hook that notes it, from before the first import on.

It sees what Python does. Native code that opens a file without Python's help stays unseen; the network is taken away
besides where the system lets a user do so (`no_network`).

Nothing but the standard library is needed here: this file is also the `sitecustomize` of a command under audit, which
Python imports before anything of the command, and stands at the head of the bare process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

LIMITS = "audit_watch.json"  # beside `sitecustomize`: what that may open, and the file to write its notes to
NETWORK = (
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.gethostbyaddr", "socket.getnameinfo",
)  # fmt: skip
PROCESSES = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "os.startfile",
)  # fmt: skip
# Of the machine, the same for everybody; of its devices none that keeps what a user has written.
SYSTEM = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/dev/zero", "/etc", "/usr", "/lib", "/lib64")


class Watch:
    """Decides what is worth a note: any network, any other process, files that are not among the allowed ones."""

    def __init__(self, allowed: Iterable[str], classes: bool = False):
        """`allowed`: files, and folders with all that is in them; `classes`: unpickling a class is noted too."""
        roots = (*allowed, sys.prefix, sys.base_prefix, sys.exec_prefix, *SYSTEM)
        self.allowed = {os.path.realpath(path) for path in roots}
        self.events = {*NETWORK, *PROCESSES, *(["pickle.find_class"] if classes else [])}

    def problem(self, event: str, arguments: tuple[Any, ...]) -> str:
        """One line about an event of the interpreter, "" where it is harmless."""
        if event in self.events:
            return f"{event} {' '.join(str(argument)[:80] for argument in arguments[-2:])}"
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return ""
        path = os.path.realpath(os.fsdecode(arguments[0]))
        inside = any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in self.allowed)
        return "" if inside else f"open {path}"


def install(watch: Watch, note: Callable[[str], object]) -> None:
    """Have every problem of this process noted from now on, and for good: an audit hook cannot be taken away."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if problem := watch.problem(event, arguments):
            note(problem)

    sys.addaudithook(hook)


def watch_command() -> None:
    """The `sitecustomize`'s part. Each note is written at once: train_gpt.py ends without handlers of its exit."""
    own = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(own, LIMITS), encoding="utf-8") as file:
        limits = json.load(file)
    notes = os.open(limits["notes"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    install(Watch([own, *limits["allowed"]]), lambda problem: os.write(notes, (problem + "\n").encode()))


@functools.cache
def no_network() -> tuple[str, ...]:
    """A command that starts another one without a network, where the system lets a user do so."""
    command = ("unshare", "-rn")
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return command


if __name__ == "sitecustomize":
    watch_command()
