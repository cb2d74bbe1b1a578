# SPDX-License-Identifier: Apache-2.0
"""Starts the server anew after a death of its engine: the process replaces itself (execve) and keeps its id and its
listening socket, so no supervisor is needed and no client is refused a connection. Nothing else survives, which is
the point: whatever state the engine's death left in the process is gone.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import psutil

from server import metrics

WINDOW_S = 600.0
_VARIABLE = "_PVQ_SERVE_RESTART"  # the socket's number and the times of restarts, from one image to the next
_GRACE_S, _KILL_TIMEOUT_S = 1.0, 20.0


def inherited() -> tuple[socket.socket | None, list[float]]:
    """Return the listening socket of the image before this one, or None, and when (Unix time) there were restarts."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None, []
    with contextlib.suppress(ChildProcessError):  # children of the image before, which nobody else waits for
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    told = json.loads(text)
    metrics.RESTARTS.set(len(told["times"]))
    listener = socket.socket(fileno=told["fd"])
    listener.set_inheritable(False)
    return listener, told["times"]


def recent(times: Sequence[float]) -> list[float]:
    """Return those of ``times`` that lie within the window."""
    return [when for when in times if time.time() - when < WINDOW_S]


def restart(listener: socket.socket, times: Sequence[float], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a fresh one with the same arguments; does not return.

    Args:
        environment: variables that this image has taken out of its own and the next one needs.
    """
    listener.set_inheritable(True)
    os.environ.update(environment)
    os.environ[_VARIABLE] = json.dumps({"fd": listener.fileno(), "times": [*recent(times), time.time()]})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end_children() -> None:
    """End what is left of the engine's processes, so that their memory is free before a new engine starts."""
    children = [
        process
        for process in psutil.Process().children(recursive=True)
        if not _is_resource_tracker(process)  # it ends with this image and frees what they have left
    ]
    _, alive = psutil.wait_procs(children, timeout=_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_KILL_TIMEOUT_S)


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def exit_at_the_latest(seconds: float, status: int) -> None:
    """End this process after ``seconds`` whatever it does then; nothing of a dead engine may hang."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()
