"""Repeated augmentation: which images an epoch has, in one process and in several."""

import pytest
from mmengine.registry import DATA_SAMPLERS

import mmdet_lors.classification  # noqa: F401
from mmdet_lors.classification import sampler


def indices(monkeypatch, rank: int = 0, processes: int = 1, seed: int = 5, epoch: int = 0, **fields) -> list[int]:
    monkeypatch.setattr(sampler, "get_dist_info", lambda: (rank, processes))
    built = DATA_SAMPLERS.build(dict(type="RepeatedAugmentation", dataset=range(700), seed=seed, **fields))
    built.set_epoch(epoch)
    found = list(built)
    assert len(found) == len(built)
    return found


def test_every_image_three_times_in_a_row_in_an_epoch_of_usual_length(monkeypatch):
    found = indices(monkeypatch)
    assert len(found) == 512  # 700 rounded down to a multiple of 256
    threes = [found[i : i + 3] for i in range(0, 510, 3)]
    assert all(len(set(three)) == 1 for three in threes) and len({three[0] for three in threes}) == 170


def test_the_repeats_go_to_different_processes(monkeypatch):
    found = [indices(monkeypatch, rank, 3) for rank in range(3)]
    assert found[0] == found[1] == found[2] and len(set(found[0])) == len(found[0]) == 170


@pytest.mark.parametrize("change", [dict(seed=6), dict(epoch=1)])
def test_the_order_is_that_of_seed_and_epoch(monkeypatch, change):
    assert indices(monkeypatch) == indices(monkeypatch) != indices(monkeypatch, **change)


def test_in_order(monkeypatch):
    assert indices(monkeypatch, shuffle=False, num_repeats=2)[:6] == [0, 0, 1, 1, 2, 2]
