"""A checkpoint's checksum: any changed bit is noticed, others read the file as before, and a failed write changes
nothing."""

import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdet_lors.engine.checkpoint.reading import read_checkpoint, write_checkpoint
from mmdet_lors.engine.checkpoint.seal import (
    SEAL_LENGTH,
    WholeFileBackend,
    breaks_its_seal,
    damage,
    remove_unfinished,
    saved_at,
    write_whole,
)
from mmdet_lors.errors import UserError


@pytest.fixture
def sealed(tmp_path) -> Path:
    path = tmp_path / "a.pth"
    write_checkpoint(dict(state_dict=nn.Linear(20, 20).state_dict(), meta=dict(epoch=3)), path)
    return path


def test_every_reader_of_checkpoints_and_zip_files_goes_on_working(sealed):
    for mmap in (False, True):
        assert torch.load(sealed, weights_only=True, mmap=mmap)["meta"]["epoch"] == 3
    assert torch.jit.load is not None and zipfile.ZipFile(sealed).testzip() is None
    assert read_checkpoint(sealed)["state_dict"]["weight"].shape == (20, 20)
    assert damage(sealed) is None and not breaks_its_seal(sealed)


def test_the_seal_stays_with_the_file(sealed, tmp_path):
    copy = tmp_path / "elsewhere" / "b.pth"
    copy.parent.mkdir()
    shutil.copy(sealed, copy)
    os.utime(copy, (0, 0))
    assert damage(copy) is None and saved_at(copy) == saved_at(sealed) > 1.7e9


def test_any_flipped_bit_is_noticed(sealed):
    data = sealed.read_bytes()
    dice = random.Random(0)
    places = {*range(len(data) - SEAL_LENGTH - 30, len(data)), *(dice.randrange(len(data)) for _ in range(300))}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << dice.randrange(8)
        sealed.write_bytes(changed)
        assert damage(sealed), f"byte {place} of {len(data)}"


def test_any_cut_is_noticed(sealed):
    data = sealed.read_bytes()
    for length in {*range(len(data) - SEAL_LENGTH - 30, len(data)), *range(0, len(data), 97)}:
        sealed.write_bytes(data[:length])
        assert damage(sealed), f"{length} of {len(data)} bytes"


def test_what_others_wrote_is_checked_by_its_crcs(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(dict(state_dict=nn.Linear(20, 20).state_dict()), path)
    assert damage(path) is None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in damage(path)


def test_a_damaged_checkpoint_is_not_read(sealed):
    data = bytearray(sealed.read_bytes())
    data[data.index(b"PK", 4) - 40] ^= 1
    sealed.write_bytes(data)
    with pytest.raises(UserError, match="a.pth was damaged after it was written: its bytes do not match its checksum"):
        read_checkpoint(sealed)


def test_a_write_that_fails_says_so_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"a.pth cannot be written: No space left on device \(2.0 MB needed, .* MB free"
    ):
        write_whole(path, bytes(1_000_000), bytes(1_000_000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    for name in (".epoch_3.pth.123.tmp", "epoch_2.pth", ".hidden"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "epoch_2.pth"]


def test_what_is_replaced_is_removed_last_and_stays_after_an_error(tmp_path):
    backend, old = WholeFileBackend(), tmp_path / "old.pth"
    old.touch()
    with pytest.raises(UserError), backend.removing_last():
        backend.remove(old)
        raise UserError("full")
    assert old.exists()
    with backend.removing_last():
        backend.remove(old)
        assert old.exists()
    assert not old.exists()
