"""How a run is asked to stop."""

import os
import signal
import time

_PARENT = os.getppid()  # at import; see StopRequest
_LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by launchers
_SAME_KEY_PRESS_S = 1.0


class StopRequest:
    """Context in which SIGTERM and SIGINT set `requested` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt, unless it comes within a second of the first:
    terminal and launcher both pass on the same Ctrl-C. `accelerate launch` with one process dies
    of a SIGTERM without telling its child, so the loss of a launcher is a request, too.
    """

    def __init__(self):
        self._signalled, self._interrupted_at = False, None

    @property
    def requested(self) -> bool:
        orphaned = bool(_LAUNCHED & set(os.environ)) and os.getppid() != _PARENT
        return self._signalled or orphaned

    def _handle(self, number, frame):
        self._signalled, now = True, time.monotonic()
        if number == signal.SIGINT:
            self._interrupted_at = self._interrupted_at or now
            if now - self._interrupted_at > _SAME_KEY_PRESS_S:
                raise KeyboardInterrupt

    def __enter__(self):
        numbers = signal.SIGTERM, signal.SIGINT
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
