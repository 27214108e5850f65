"""What the processes of a run tell one another besides their collectives: how far each is, and that
one failed. A hang or a failure of one ends all, with a sentence that names it.

Each process has a thread that writes into the store of the process group, which every launcher has,
and reads what the others wrote. Nothing is waited for: a process that hangs, or is frozen, is seen
by those that do not.
"""

import atexit
import json
import os
import sys
import threading
import time

from utils import UserError

TIMEOUT = "DIM_TIMEOUT_S"  # environment variable: seconds without progress of any process
DEFAULT_TIMEOUT_S = 1800  # a rank may save or sample while the others wait
WAITING = "waiting for the others"
_current = None


def timeout_s():
    """Seconds after which a run without progress ends; UserError for a value that is no number."""
    given = os.environ.get(TIMEOUT) or str(DEFAULT_TIMEOUT_S)
    if not given.isdigit() or given == "0":
        raise UserError(f"{TIMEOUT} is {given!r}, expected a whole number of seconds")
    return int(given)


class Watch:
    """One process's view of all; see `start`.

    Progress is counted from the first `beat` of every process on, signs of life from the start.
    Time is counted in polls of our own, so that a whole run that was suspended does not look like
    one that hangs.
    """

    def __init__(self, store, rank, num_processes, timeout):
        self.store, self.rank, self.num_processes = store, rank, num_processes
        self.timeout, self.interval = timeout, min(max(timeout / 20, 0.2), 5.0)
        self.beats, self.doing, self.pulse = 0, "starting", 0
        self.silent = dict.fromkeys(range(num_processes), 0.0)  # seconds without a pulse
        self.idle = dict.fromkeys(range(num_processes), 0.0)  # seconds without a beat
        self.seen = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.publish()

    def publish(self):
        self.pulse += 1
        said = json.dumps([self.pulse, self.beats, self.doing])
        self.store.set(f"rank{self.rank}", said)

    def read(self):
        """rank -> [pulse, beats, doing] of all processes that have said something."""
        names = {rank: f"rank{rank}" for rank in range(self.num_processes)}
        return {
            rank: json.loads(self.store.get(name))
            for rank, name in names.items()
            if self.store.check([name])
        }

    def look(self, seconds):
        """Take in what the others say, `seconds` after the last time."""
        found = self.read()
        for rank, (pulse, beats, _) in found.items():
            before = self.seen.get(rank, (None, None))
            self.silent[rank] = 0.0 if pulse != before[0] else self.silent[rank] + seconds
            self.idle[rank] = 0.0 if beats != before[1] else self.idle[rank] + seconds
        self.seen = found

    def hangs(self):
        """Whether every process has begun, and none got on within the timeout, or one that has not
        begun gave no sign of life for as long.
        """
        late = [rank for rank, (_, beats, _) in self.seen.items() if not beats]
        if late or len(self.seen) < self.num_processes:
            return any(self.silent[rank] > self.timeout for rank in late)
        return min(self.idle.values()) > self.timeout

    def dead(self):
        """Ranks that gave no sign of life for half the timeout, or several polls."""
        limit = max(self.timeout / 2, 4 * self.interval)
        return [rank for rank, seconds in self.silent.items() if seconds > limit]

    def verdict(self):
        """The sentence on a run that hangs: which rank holds up the others."""
        head = f"no process got on for {self.timeout:g} s"
        if dead := self.dead():
            return f"{head}: {_ranks(dead)} not answering: frozen, killed, or its machine is lost"
        doing = {rank: doing for rank, (_, _, doing) in self.seen.items()}
        beats = {rank: beats for rank, (_, beats, _) in self.seen.items()}
        behind = [rank for rank in doing if doing[rank] != WAITING]
        if len(behind) == len(doing):
            behind = [rank for rank in beats if beats[rank] < max(beats.values())]
        if not behind:
            return f"{head}, and none is behind: the network between them, or a GPU, hangs"
        what = "; ".join(f"rank {rank} is {doing[rank]}" for rank in behind)
        return f"{head}: the others wait for {_ranks(behind, verb='')} ({what})"

    def failed(self):
        """The rank that failed, or None."""
        return int(self.store.get("failed")) if self.store.check(["failed"]) else None

    def step(self, seconds):
        """One poll; the sentence with which this process has to end, or None.

        Of a hang the first rank that still answers speaks; the others end because of it.
        """
        self.publish()
        failed = self.failed()
        if failed is not None and failed != self.rank:
            return because_of(failed)
        self.look(seconds)
        first = min(set(self.silent) - set(self.dead()), default=self.rank)
        return self.verdict() if self.hangs() and self.rank == first else None

    def run(self):
        """The thread: ends the process if it must end, and itself with the process group."""
        import torch.distributed

        before = time.monotonic()
        while torch.distributed.is_initialized() and not self.ended.wait(self.interval):
            now = time.monotonic()
            try:
                sentence = self.step(min(now - before, 2 * self.interval))
            except (RuntimeError, OSError):  # the store ends with the launcher or with rank 0
                return
            before = now
            if sentence and torch.distributed.is_initialized() and _current is self:
                fail(lambda sentence=sentence: say(sentence, self.rank))
                os._exit(1)  # the main thread may never come back

    def end(self):
        """End the thread. If it were inside the store while Python goes down, it would not get the
        interpreter's lock again, and abort a process that was through with its work.
        """
        self.ended.set()
        self.thread.join(timeout=5)  # a store whose machine is lost may hold it for longer


def _ranks(ranks, verb=" is"):
    if len(ranks) == 1:
        return f"rank {ranks[0]}{verb}"
    return f"ranks {', '.join(map(str, ranks))}{verb and ' are'}"


def because_of(rank):
    """The sentence of a process that ends because another did."""
    return f"stopped because rank {rank} did; its message says why"


def say(sentence, rank):
    """Print a process's last words."""
    where = f" (rank {rank})" if rank else ""
    print(f"\nerror{where}: {sentence}", file=sys.stderr, flush=True)


def start(timeout):
    """Watch the processes of the process group that was just made, until it is destroyed."""
    global _current
    import torch.distributed

    world = torch.distributed.get_world_size()
    store = torch.distributed.distributed_c10d._get_default_store()
    store = store.clone() if hasattr(store, "clone") else store  # else shared with collectives
    store = torch.distributed.PrefixStore("dim-watch", store)
    _current = Watch(store, torch.distributed.get_rank(), world, timeout)
    atexit.register(_current.end)
    _current.thread.start()


def beat(doing):
    """Say that this process got on, and what it is doing now. Costs no communication."""
    if _current:
        _current.beats += 1
        _current.doing = doing


def fail(report=lambda: None):
    """`report()` why this process ends with an error, and tell the others that it does."""
    global _current
    watch, _current = _current, None  # from here on, the thread says nothing
    report()
    if watch:
        try:
            if watch.failed() is None:
                watch.store.set("failed", str(watch.rank))
        except (RuntimeError, OSError):
            pass  # the store is gone, and with it the others


def ended_by_others(error):
    """The sentence for an exception that another process's end caused in a collective; None for any
    other exception.
    """
    if _current is None or not isinstance(error, RuntimeError):
        return None
    import torch.distributed

    broken = isinstance(error, getattr(torch.distributed, "DistError", ()))
    if not broken and "gloo/" not in str(error) and "NCCL" not in str(error):
        return None
    try:
        failed = _current.failed()
    except (RuntimeError, OSError):
        failed = None
    if failed is not None and failed != _current.rank:
        return because_of(failed)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0][:300] + (f" ... {lines[-1][:300]}" if len(lines) > 1 else "")
    return (
        "what the processes do together failed: mostly, another ended or was killed, or its "
        f"machine is lost; the same command goes on from the last checkpoint ({said})"
    )
