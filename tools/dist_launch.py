"""torchrun, with a failed process reported in one line: what went wrong is what that process printed before."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"process {rank} ended with exit status {failure.exitcode}; its message is above")
