"""Run torchrun, but pass SIGTERM on and wait for the processes, and report a failed one in one line."""

import os
import signal
import sys
from pathlib import Path

import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, main

TOLD_TO_STOP = "MMDET_LORS_TOLD_TO_STOP"
"""As in mmdet_lors/engine/processes/stop.py: a process that is restarted with it set ends at once."""


def children() -> list[int]:
    """Process ids of this process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def pass_on(signum: int, _) -> None:
    """Let the processes finish and save; torchrun itself would kill them after 30 seconds, and fail."""
    os.environ[TOLD_TO_STOP] = "1"
    for process in children():
        os.kill(process, signum)


def ending(exit_code: int) -> str:
    """How a process ended, by its exit code."""
    if exit_code >= 0:
        return f"ended with exit status {exit_code}; its message is above"
    hint = " (out of memory, or by a user)" if -exit_code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-exit_code).name}{hint}; go on with --resume"


if __name__ == "__main__":
    if not os.access("/proc/self/stat", os.R_OK):
        sys.exit("error: several processes need Linux; elsewhere use a single one: python tools/train.py CONFIG")
    signal.signal(signal.SIGTERM, pass_on)
    # torch 2.6 cannot be kept from handling SIGTERM itself.
    known = "--signals-to-handle" in get_args_parser().format_help()
    try:
        main([*(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"] if known else []), *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"process {rank} {ending(failure.exitcode)}")
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = get_args_parser().parse_args().master_port
        sys.exit(f"error: port {port} is in use, perhaps by another run; set PORT to a free one, as PORT={port + 1}")
