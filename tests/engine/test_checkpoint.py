"""Checkpoints: mmengine's own load safely, others are refused in one line."""

import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdet_lors.engine.checkpoint import check_fit, read_checkpoint, write_checkpoint
from mmdet_lors.errors import UserError


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
