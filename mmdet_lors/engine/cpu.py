"""How a process that computes on a CPU waits, and what it keeps."""

import atexit
import ctypes
import math
import os
import threading
import time
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of two settings of glibc's allocator, see ``man mallopt``."""

PRIMITIVES = 256
"""How many convolutions oneDNN keeps prepared, each for one size of image. Its own choice is 1024, of which one size
takes fifty to a hundred; images of many sizes fill gigabytes with the rest."""

SYSTEM = Path("/proc/stat")
"""Where Linux says what each core has done since it started, see ``man proc_stat``."""

INTERVAL = 1.0
"""Seconds between two looks at what the cores do."""


def prepare_cpu() -> None:
    """Everything that this module does, for a process that has not computed yet; see docs/speed.md."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))  # read at the first convolution
    keep_memory()
    share_cores()


def keep_memory() -> None:
    """Make glibc keep freed memory for the next iteration, which needs as much again.

    It would give large blocks back to the system, which clears every page of them when they are asked for again. A
    setting of the allocator in the environment has precedence.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another libc
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


@cache  # once for a process
def share_cores() -> None:
    """From now on, let OpenMP's waiting threads sleep at once while other processes need the cores (on Linux).

    ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` in the environment have precedence.
    """
    threads = torch.get_num_threads()
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
    if not chosen and threads > 1 and SYSTEM.is_file():
        watch = Watch(os.sched_getaffinity(0), threads)
        watch.start()
        atexit.register(watch.end)  # A thread that the interpreter's end finds inside PyTorch aborts the process.


class Watch(threading.Thread):
    """Looks at the cores, and lets teams idle while others need them.

    Args:
        cores, threads: the process's cores, and how many threads compute.
    """

    def __init__(self, cores: set[int], threads: int) -> None:
        super().__init__(daemon=True)
        self.cores, self.threads, self._ended = cores, threads, threading.Event()

    def run(self) -> None:
        """Until the end."""
        teams, before = None, _seconds(self.cores)
        # More than the cores that this process leaves, by a quarter of those that it uses.
        limit = len(self.cores) - self.threads + self.threads / 4
        while not self._ended.wait(INTERVAL):
            now = _seconds(self.cores)
            passed, busy, own = (new - old for new, old in zip(now, before, strict=True))
            before, shared = now, busy - own > limit * passed
            if shared and teams is None:
                teams = IdleTeams(len(self.cores), self.threads)
            elif teams is not None and not shared:
                teams.close()
                teams = None
        if teams is not None:
            teams.close()

    def end(self) -> None:
        """End it, and its teams."""
        self._ended.set()
        self.join()


def _seconds(cores: set[int]) -> tuple[float, float, float]:
    """The time, how long these cores were busy, all together, and how much of it this process was."""
    names = {f"cpu{core}" for core in cores}
    rows = [row.split() for row in SYSTEM.read_text().splitlines()]
    ticks = sum(sum(map(int, row[1:4] + row[6:9])) for row in rows if row[0] in names)  # all but idle and disk
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class IdleTeams:
    """Teams of OpenMP's threads that do nothing, so that there are more threads than cores, until they are closed.

    A waiting thread looks for work 300,000 times before it sleeps, about 15 ms. This fills the gaps between small
    operations, but takes its core from other processes. With more threads than cores, OpenMP makes it 100 times
    (``GOMP_SPINCOUNT`` in libgomp's manual). No setting can be changed in a process that runs; this can, and it changes
    no result.

    Args:
        cores, threads: the process's cores, and the threads that compute.
    """

    def __init__(self, cores: int, threads: int) -> None:
        self._closed = threading.Event()
        count = math.ceil((cores - threads + 1) / (threads - 1))
        self._owners = [threading.Thread(target=self._own, args=(threads,), daemon=True) for _ in range(count)]
        for owner in self._owners:
            owner.start()

    def _own(self, threads: int) -> None:
        torch.ones(threads << 15).add_(1)  # as much for each thread as torch gives one at the least
        self._closed.wait()

    def close(self) -> None:
        """End the teams' threads."""
        self._closed.set()
        for owner in self._owners:
            owner.join()
