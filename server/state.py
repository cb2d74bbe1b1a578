# SPDX-License-Identifier: Apache-2.0
"""What the server is doing, from its start to its end; every part that needs to know asks this one object."""

import enum
import time

from server import metrics


class Phase(enum.Enum):
    """The stages of a server's life. Only in READY does it take requests."""

    LOADING = "the model is loading"
    READY = ""
    DRAINING = "the server is shutting down"
    FAILED = "the engine died"


class ServerState:
    """The phase of the server and the number of requests that run.

    Attributes:
        running: HTTP requests that have begun and not ended, probes not counted.
        told_to_end: whether it has been in DRAINING; a server that fails then must not start again.
    """

    def __init__(self) -> None:
        self.running, self.told_to_end = 0, False
        self.started_at = time.monotonic()
        self._phase = Phase.LOADING
        metrics.READY.set(0)

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Go to ``phase``; a server that has failed stays failed."""
        self.told_to_end |= phase is Phase.DRAINING
        if self._phase is not Phase.FAILED:
            self._phase = phase
        metrics.READY.set(self._phase is Phase.READY)
