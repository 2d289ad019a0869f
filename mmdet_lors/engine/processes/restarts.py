"""What processes have to do differently once torchrun has started them again."""

import os
from typing import Any

from torch.distributed import PrefixStore, TCPStore


def restarts() -> int:
    """How often torchrun has started this run's processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarted_store() -> dict[str, Any]:
    """Arguments of ``init_process_group`` for a run that was started again; none for others.

    The launcher keeps its store when it starts the processes again, with the addresses of the ended ones in it, and
    torch 2.11 leaves it to chance which are found. Under a prefix of its own, each attempt finds its own.
    """
    if not restarts():
        return {}
    world_size = int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    return dict(store=PrefixStore(f"attempt_{restarts()}", store), rank=int(os.environ["RANK"]), world_size=world_size)
