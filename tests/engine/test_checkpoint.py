"""Checkpoints: mmengine's own load safely, others are refused in one line."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint, write_checkpoint
from mmdet_lors.errors import UserError
from mmdet_lors.pela import compress


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_what_mmengine_writes_loads_in_the_safe_mode(tmp_path):
    history = HistoryBuffer([0.5, 0.25], [1, 1], max_length=10)
    scalars = [np.float64(1.5), np.float32(0.5), np.int64(3), np.arange(3), np.bool_(True)]
    torch.save(dict(state_dict={}, message_hub=dict(loss=history), meta=scalars), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint["message_hub"]["loss"].current() == 0.25
    assert checkpoint["meta"][2] == 3 and checkpoint["meta"][3].tolist() == [0, 1, 2]


def test_a_checkpoint_that_would_run_a_command_is_refused(tmp_path):
    target = tmp_path / "ran"
    torch.save(dict(state_dict={}, meta=Malicious(target)), tmp_path / "a.pth")
    with pytest.raises(UserError, match="not safe to load"):
        read_checkpoint(tmp_path / "a.pth")
    assert not target.exists()


class Reaching:
    """Takes an attribute of an allowed class when unpickled, from where others can be reached."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_a_checkpoint_that_reaches_into_an_allowed_class_is_refused(tmp_path):
    torch.save(dict(state_dict={}, meta=Reaching()), tmp_path / "a.pth")
    with pytest.raises(UserError, match="not safe to load"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_plain_pickle_that_would_run_a_command_is_refused(tmp_path):
    target = tmp_path / "ran"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(UserError, match="a.pth"):
        read_checkpoint(tmp_path / "a.pth")
    assert not target.exists()


def test_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.9, -1])
def test_cut_short(tmp_path, keep):
    path = tmp_path / "a.pth"
    torch.save(dict(state_dict=nn.Linear(100, 100).state_dict()), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="a.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02garbage", b"PK\x03\x04" + b"0" * 100])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth"):
        read_checkpoint(tmp_path / "a.pth")


def test_no_dict(tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds a list, not a dict of weights"):
        read_checkpoint(tmp_path / "a.pth")


def test_fit_counts_and_names_what_differs():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = model.state_dict()
    check_fit(model, dict(state_dict=weights), "a.pth")
    check_fit(model, {f"module.{k}": v for k, v in weights.items()}, "a.pth")
    wrong = dict(weights, extra=torch.zeros(1))
    del wrong["0.weight"], wrong["0.bias"]
    wrong["1.weight"] = torch.zeros(5, 3)
    with pytest.raises(UserError) as error:
        check_fit(model, wrong, "a.pth")
    assert str(error.value) == (
        "checkpoint a.pth is of another architecture: keys 2 missing (0.weight, 0.bias); 1 unexpected (extra); "
        "1 of another shape (1.weight (5, 3) instead of (4, 3))"
    )


def test_fine_tuning_needs_one_weight_that_fits():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    check_fit(model, {"0.weight": torch.zeros(3, 2), "head": torch.zeros(1)}, "a.pth", partly=True)
    with pytest.raises(UserError, match="4 missing"):
        check_fit(model, {"head": torch.zeros(1)}, "a.pth", partly=True)


def compressed() -> tuple[nn.Module, nn.Module]:
    """A model, and its low-rank form; the last layer stays whole."""
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    return model, compress(model, 2, omit=["2"])[0]


def test_a_low_rank_layer_fits_factors_or_the_whole_weight():
    model, low_rank = compressed()
    for weights in (model.state_dict(), low_rank.state_dict()):
        check_fit(low_rank, weights, "a.pth")
        check_fit(low_rank, {f"module.{k}": v for k, v in weights.items()}, "a.pth")
        check_fit(copy.deepcopy(low_rank).to("meta"), weights, "a.pth")
    check_fit(low_rank[0], model[0].state_dict(), "a.pth")
    with pytest.raises(UserError, match=r"1 missing \(0.weight\); 2 unexpected \(0.U, 0.V\)"):
        check_fit(model, low_rank.state_dict(), "a.pth")


def test_what_does_not_fit_a_low_rank_layer_is_named():
    model, low_rank = compressed()
    weights = model.state_dict()
    wide = dict(weights, **{"0.weight": torch.zeros(16, 9)})
    of_another_shape = (
        "checkpoint a.pth is of another architecture: keys 1 of another shape (0.weight (16, 9) instead of (16, 8))"
    )
    without = {k: v for k, v in weights.items() if k != "0.weight"}
    half = dict(weights, **{"0.U": torch.zeros(8, low_rank[0].rank)})
    for wrong, message in (
        (wide, of_another_shape),
        (without, "checkpoint a.pth is of another architecture: keys 2 missing (0.U, 0.V)"),
        (half, "checkpoint a.pth is of another architecture: keys 1 missing (0.V); 1 unexpected (0.weight)"),
    ):
        with pytest.raises(UserError) as error:
            check_fit(low_rank, wrong, "a.pth")
        assert str(error.value) == message


def test_a_low_rank_layer_in_two_places_fits_the_whole_weight_in_both():
    layer = nn.Linear(8, 16)
    model = nn.ModuleDict(dict(a=layer, b=layer))
    low_rank, _ = compress(model, 2)
    check_fit(low_rank, model.state_dict(), "a.pth")
    assert {"a.U", "b.U"} <= low_rank.state_dict().keys()


def test_fine_tuning_counts_a_whole_weight_as_one_that_fits():
    _, low_rank = compressed()
    check_fit(low_rank, {"0.weight": torch.zeros(16, 8)}, "a.pth", partly=True)
    with pytest.raises(UserError, match=r"0.weight \(16, 9\) instead of \(16, 8\)"):
        check_fit(low_rank, {"0.weight": torch.zeros(16, 9)}, "a.pth", partly=True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")

    def full_disk(_, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="out.pth cannot be written: no space left"):
        write_checkpoint({}, out)
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_weights_that_are_not_finite_are_refused():
    model = nn.Linear(3, 2)
    weights = {"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}
    with pytest.raises(UserError, match=r"checkpoint bad\.pth: weight holds values that are not finite"):
        check_fit(model, {"state_dict": weights}, "bad.pth")
