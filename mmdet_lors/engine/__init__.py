"""Everything a run needs around the model: launch, checkpoints, resuming, processes, and checks before it starts."""

from mmdet_lors.compatibility import check_versions

check_versions()
