"""Which images an epoch of DeiT has."""

from collections.abc import Sized

from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from timm.data.distributed_sampler import RepeatAugSampler


@DATA_SAMPLERS.register_module()
class RepeatedAugmentation(RepeatAugSampler):
    """Every image ``num_repeats`` times in a row, each time augmented anew: timm's sampler, with the run's seed.

    An epoch is as long as without repeats, so that it sees a part of the images; over all processes it is rounded down
    to a multiple of 256 images. The repeats of an image go to different processes, as far as there are some. Source:
    Hoffer et al., arXiv:1901.09335.

    Args:
        dataset: any.
        seed: of the run; by default one that all processes agree on.
        shuffle: whether every epoch has an order of its own.
        num_repeats: of an image.
    """

    def __init__(self, dataset: Sized, seed: int | None = None, shuffle: bool = True, num_repeats: int = 3) -> None:
        rank, processes = get_dist_info()
        super().__init__(dataset, processes, rank, shuffle, num_repeats)
        self.seed = sync_random_seed() if seed is None else seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch; timm's has no seed but its number."""
        super().set_epoch(self.seed + epoch)
