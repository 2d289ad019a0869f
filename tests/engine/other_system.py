"""Runs tools on a Linux that answers like Windows: ``other_system.py "train.py CONFIG ..." "test.py CONFIG ..."``.

A data worker, which is spawned and so runs this file again, has no more than its parent.
"""

import errno
import multiprocessing
import multiprocessing.resource_tracker
import os
import platform
import signal
import socket
import sys
from pathlib import Path

# What others wrote asks sys.platform, which stays: they get what they need before it goes.
import mmdet.apis
import mmdet.datasets
import mmdet.evaluation
import mmdet.models  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MISSING = {
    signal: "sigwaitinfo sigtimedwait sigwait pthread_sigmask pthread_kill SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGALRM",
    os: "fork forkpty getuid geteuid getgid uname setsid killpg sched_getaffinity getloadavg statvfs O_DIRECTORY",
    socket: "if_nameindex",
}


def become_another_system() -> None:
    """Take away what Windows has not."""
    for module, names in MISSING.items():
        for name in names.split():
            delattr(module, name)
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    platform.system = lambda: "Windows"
    multiprocessing.resource_tracker._HAVE_SIGMASK = False
    for method in ("fork", "forkserver"):
        multiprocessing.context._concrete_contexts.pop(method)
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    multiprocessing.set_start_method("spawn", force=True)
    sys.addaudithook(refuse_proc)


def refuse_proc(event: str, args: tuple) -> None:
    """No file is below /proc."""
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith("/proc"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(args[0]))


become_another_system()

if __name__ == "__main__":
    from conftest import load_tool

    from mmdet_lors.engine.launch import run

    os.chdir(ROOT)
    for line in sys.argv[1:]:
        sys.argv = line.split()
        tool = load_tool(sys.argv[0])
        run(tool.main)
