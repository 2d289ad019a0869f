"""What processes must do differently after torchrun has restarted them."""

import os
from typing import Any

from torch.distributed import PrefixStore, TCPStore


def restarts() -> int:
    """How often torchrun has restarted this run's processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarted_store() -> dict[str, Any]:
    """Arguments of ``init_process_group`` for a run that was restarted; none for others.

    When the launcher restarts the processes it keeps its store, which still has the addresses of the ended ones, and
    with torch 2.11 it is left to chance which are found. With a prefix of its own, each attempt finds its own.
    """
    if not restarts():
        return {}
    world_size = int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    return dict(store=PrefixStore(f"attempt_{restarts()}", store), rank=int(os.environ["RANK"]), world_size=world_size)
