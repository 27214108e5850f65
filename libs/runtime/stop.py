"""How a run is asked to stop."""

import os
import signal
import time

_PARENT = os.getppid()  # at import; see StopRequest
_LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by launchers
_SAME_KEY_PRESS_S = 1.0
# What schedulers send before they kill: SLURM the signal that --signal names, often USR1; submitit
# USR2; SGE either with -notify, and XCPU at a soft limit; LSF USR2 at its run limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopRequest:
    """Context in which SIGNALS set `requested` instead of ending the process.

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
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
