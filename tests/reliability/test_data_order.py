"""What is loaded depends on the seed and the position alone: not on workers, nor on what was loaded before."""

import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmdet_lors.engine.random_state import random_state, seeded, set_random_state
from mmdet_lors.engine.resume.data_order import ResumableLoader, SeededDataset


class Augmented(Dataset):
    """Its index, and random numbers of all three kinds."""

    name = "augmented"

    def __len__(self):
        return 11

    def __getitems__(self, indices):
        raise AssertionError("torch goes around __getitem__")

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def loader(workers: int = 0, sampler=DefaultSampler) -> ResumableLoader:
    dataset = Augmented()
    batches = BatchSampler(sampler(dataset, seed=1), batch_size=2, drop_last=False)
    plain = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0, collate_fn=list
    )
    return ResumableLoader.of(plain, seed=1)


def epochs(of: ResumableLoader, first: int = 0, number: int = 2) -> list:
    found = []
    for epoch in range(first, first + number):
        of.batch_sampler.sampler.set_epoch(epoch)
        found.append(list(of))
    return found


def test_the_same_with_any_number_of_workers():
    torch.manual_seed(5)
    found = epochs(loader())
    torch.manual_seed(6)
    assert epochs(loader(workers=3)) == found
    flat = [sample for epoch in found for batch in epoch for sample in batch]
    assert len({sample[1:] for sample in flat}) == 22
    assert sorted(sample[0] for sample in flat[:11]) == list(range(11)) and len(loader()) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_in_the_middle_of_an_epoch(workers):
    whole, resumed = epochs(loader(workers), number=3), loader(workers)
    resumed.batch_sampler.start = 4
    assert epochs(resumed, first=1) == [whole[1][4:], whole[2]]


def test_goes_on_in_an_endless_order():
    endless = iter(loader(sampler=InfiniteSampler))
    whole = [next(endless) for _ in range(20)]
    resumed = loader(sampler=InfiniteSampler)
    resumed.batch_sampler.start = 15
    resumed = iter(resumed)
    assert [next(resumed) for _ in range(5)] == whole[15:]


def test_loading_draws_nothing_from_the_models_random_numbers():
    before = random_state()
    epochs(loader())
    epochs(loader(workers=1))
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"]["words"], after["python"]["words"])
    assert torch.equal(before["numpy"]["key"], after["numpy"]["key"])
    assert before["numpy"]["position"] == after["numpy"]["position"]


def test_skipped_batches_are_not_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(Augmented, "__getitem__", lambda self, index: loaded.append(index))
    resumed = loader()
    resumed.batch_sampler.start = 4
    list(resumed)
    assert len(loaded) == 3


def test_a_random_state_survives_the_safe_loader(tmp_path):
    random.gauss(0, 1), np.random.randn(1)  # both keep a second number for later
    torch.save(random_state(), tmp_path / "state.pth")
    drawn = [(random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()) for _ in range(3)]
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [(random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()) for _ in range(3)] == drawn


def test_seeds_differ_by_every_part_of_the_key():
    def draw(key):
        with seeded(key):
            return random.random(), np.random.rand(), torch.rand(()).item()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for numbers in zip(*map(draw, keys), strict=True):
        assert len(set(numbers)) == len(keys)
    assert draw(keys[2]) == draw(keys[2])


def test_the_data_set_stays_itself_to_others():
    dataset = Augmented()
    wrapped = SeededDataset(dataset)
    wrapped.pipeline = "switched"
    assert wrapped.name == "augmented" and dataset.pipeline == "switched"
    assert not hasattr(wrapped, "__getitems__")
