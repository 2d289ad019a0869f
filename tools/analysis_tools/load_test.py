"""Load the API of tools/web_demo.py with clients that send pictures one after another, and count what comes back.

A request is answered (status 200), refused with a reason (400 to 499, or 503, after which a client waits as long as it
is told), or has failed: the exit status is 1 if one has.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8080/detect")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures, which are sent in turn")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="at the same time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="how long (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="in a request (default: %(default)s)")
    parser.add_argument("--pid", type=int, help="the server's process, to print its resident memory (on Linux)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import cycle, islice
from statistics import quantiles

from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work.

    Raises:
        UserError: names the option and what would be right.
    """
    if find_spec("httpx") is None:
        raise UserError("the clients need httpx: pip install -e .[web]")
    for option in ("clients", "seconds", "pictures"):
        if (value := getattr(args, option)) <= 0:
            raise UserError(f"--{option} {value}: must be above 0")
    if missing := [path for path in args.images if not path.is_file()]:
        raise UserError(f"image {missing[0]} does not exist")
    if args.pid is not None:
        resident(args.pid)


def resident(pid: int) -> float:
    """The memory that a process occupies, in MB.

    Raises:
        UserError: there is no such process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise UserError(f"--pid {pid}: its memory cannot be read: {error.strerror}") from error
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def ask(args: argparse.Namespace, images: Iterator[tuple[str, bytes]], end: float) -> list[tuple[float, str]]:
    """Send a request, and others until the end.

    Args:
        images: names and contents, without end.

    Returns:
        Per request the seconds that it took, and its outcome.
    """
    import httpx

    outcomes = []
    with httpx.Client(timeout=60, trust_env=False) as client:  # not through a proxy
        while not outcomes or time.monotonic() < end:
            begin = time.monotonic()
            files = [("image", image) for image in islice(images, args.pictures)]
            try:
                response = client.post(args.url, files=files)
                outcome = outcome_of(response.status_code, response.text)
                wait = float(response.headers.get("Retry-After", 0))
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome, wait = f"failed: {error or type(error).__name__}", 1.0
            outcomes.append((time.monotonic() - begin, outcome))
            time.sleep(wait)
    return outcomes


def outcome_of(status: int, text: str) -> str:
    """What an answer of the server means, in one line."""
    if status == 200:
        return "answered"
    refused = (400 <= status < 500 or status == 503) and text
    return f"{'refused' if refused else 'failed'}: {status} {' '.join(text.split())[:200]}"


def report(args: argparse.Namespace, outcomes: list[tuple[float, str]], memory: list[float]) -> None:
    """Print what came of the requests, and the server's memory in MB over time.

    Raises:
        UserError: a request has failed.
    """
    counts = Counter(outcome for _, outcome in outcomes)
    kinds = Counter(outcome.partition(":")[0] for _, outcome in outcomes)
    print(
        f"{args.clients} clients, {args.seconds:g} s: {len(outcomes)} requests, {kinds['answered']} answered, "
        f"{kinds['refused']} refused, {kinds['failed']} failed"
    )
    seconds = [second for second, outcome in outcomes if outcome == "answered"]
    if len(seconds) > 1:
        parts = quantiles(seconds, n=20)
        speed = len(seconds) * args.pictures / args.seconds
        print(f"answered in {parts[9]:.3f} s (median), {parts[18]:.3f} s (95%); {speed:.1f} pictures/s")
    for outcome, count in counts.most_common():
        if outcome != "answered":
            print(f"{count} {outcome}")
    if memory:
        warm = memory[len(memory) // 6 :]
        print(
            f"resident memory: {memory[0]:.1f} MB, after a sixth of the time {warm[0]:.1f} MB, from then on at most "
            f"{max(warm):.1f} MB, at the end {warm[-1]:.1f} MB"
        )
    if kinds["failed"]:
        raise UserError(f"{kinds['failed']} of {len(outcomes)} requests failed")


def main() -> None:
    """Let the clients ask, and watch the server's memory meanwhile."""
    args = parse_args()
    check(args)
    images = [(path.name, path.read_bytes()) for path in args.images]
    memory = []
    end = time.monotonic() + args.seconds
    with ThreadPoolExecutor(args.clients) as clients:
        turns = [islice(cycle(images), i % len(images), None) for i in range(args.clients)]
        asked = [clients.submit(ask, args, turn, end) for turn in turns]
        while not all(client.done() for client in asked):
            if args.pid is not None:
                memory.append(resident(args.pid))
            time.sleep(min(1, args.seconds / 12))
    report(args, [outcome for client in asked for outcome in client.result()], memory)


if __name__ == "__main__":
    run(main)
