"""Checkpoints: any damage is noticed or harmless, others read the file as before, and a failed write changes
nothing."""

import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from runs import differences
from torch import nn

from mmdet_lors.engine.checkpoint.reading import Damaged, read_checkpoint, write_checkpoint
from mmdet_lors.engine.checkpoint.whole_files import WholeFileBackend, remove_unfinished, saved_at, write_whole
from mmdet_lors.errors import UserError

BEFORE = Path(__file__).parents[1] / "data" / "sealed_by_0.1.pth"
"""Written by mmdet_lors 0.1, with a SHA-256 and the time as comment of the archive."""


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "a.pth"
    write_checkpoint(dict(state_dict=nn.Linear(4, 4).state_dict(), meta=dict(epoch=3)), path)
    return path


@pytest.fixture
def by_torch(tmp_path) -> Path:
    path = tmp_path / "b.pth"
    torch.save(dict(state_dict=nn.Linear(4, 4).state_dict(), meta=dict(epoch=3)), path)
    return path


def test_every_reader_of_checkpoints_and_zip_files_goes_on_working(written):
    for mmap in (False, True):
        assert torch.load(written, weights_only=True, mmap=mmap)["meta"]["epoch"] == 3
        assert read_checkpoint(written, mmap)["state_dict"]["weight"].shape == (4, 4)
    assert zipfile.ZipFile(written).testzip() is None


def test_the_time_stays_with_the_file(written, tmp_path):
    copy = tmp_path / "elsewhere" / "b.pth"
    copy.parent.mkdir()
    shutil.copy(written, copy)
    os.utime(copy, (0, 0))
    assert saved_at(copy) == saved_at(written) > 1.7e9
    write_checkpoint({}, written)
    assert saved_at(copy) < saved_at(written)


def test_the_version_befores_checkpoints_load(tmp_path):
    path = tmp_path / "a.pth"
    shutil.copyfile(BEFORE, path)
    os.utime(path, (0, 0))
    assert read_checkpoint(path)["state_dict"]["weight"].shape == (4, 4)
    assert 1.7e9 < saved_at(path) < saved_at(Path(__file__)) + 1e9


@pytest.mark.parametrize("which", ["written", "by_torch", "version before"])
def test_any_flipped_bit_is_noticed_or_harmless(which, request, tmp_path):
    """A bit of every byte, and every bit of the archive's directory."""
    data = (BEFORE if which == "version before" else request.getfixturevalue(which)).read_bytes()
    path, dice = tmp_path / "flipped.pth", random.Random(0)
    path.write_bytes(data)
    whole = read_checkpoint(path)
    flips = [(place, dice.randrange(8)) for place in range(len(data))]
    flips += [(place, bit) for place in range(data.index(b"PK\1\2"), len(data)) for bit in range(8)]
    noticed = set()
    with path.open("r+b", buffering=0) as file:
        for place, bit in flips:
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << bit]), place)
            try:
                assert not differences(whole, read_checkpoint(path)), f"bit {bit} of byte {place} of {len(data)}"
            except Damaged as error:
                noticed.add(place)
                assert str(error).startswith(f"checkpoint {path} ") and "\n" not in str(error)
            os.pwrite(file.fileno(), data[place : place + 1], place)
        records = zipfile.ZipFile(path).infolist()
    print(f"{which}: {len(data)} bytes, {len(flips)} flips, noticed in {len(noticed)} bytes, the others harmless")
    assert len(noticed) > sum(record.file_size for record in records)


def test_any_cut_is_noticed(written):
    for length in reversed(range(written.stat().st_size)):
        os.truncate(written, length)
        with pytest.raises(Damaged, match=r"a\.pth.* is not a checkpoint|a\.pth.* cannot be read: it is cut short"):
            read_checkpoint(written)


@pytest.mark.parametrize("content", [bytes(5000), bytes(range(256)) * 20], ids=["zeros", "anything"])
def test_lost_content_is_noticed(content, written):
    written.write_bytes(content)
    with pytest.raises(Damaged):
        read_checkpoint(written)
    assert saved_at(written) == written.stat().st_mtime


def test_a_zeroed_block_is_noticed(written):
    data = written.read_bytes()
    for start in range(0, len(data), 64):
        written.write_bytes(data[:start] + bytes(512) + data[start + 512 :])
        with pytest.raises(Damaged):
            read_checkpoint(written)


def test_checksums_are_written_whatever_the_user_has_set(tmp_path):
    """torch can be told to write none: such files of others are read, ours have them."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(a=torch.ones(3)), tmp_path / "theirs.pth")
        write_checkpoint(dict(a=torch.ones(3)), tmp_path / "ours.pth")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "theirs.pth")["a"].sum() == 3
    assert all(record.CRC for record in zipfile.ZipFile(tmp_path / "ours.pth").infolist())


def test_a_damaged_checkpoint_is_not_read(written):
    data = bytearray(written.read_bytes())
    data[data.index(read_checkpoint(written)["state_dict"]["weight"].numpy().tobytes())] ^= 1
    written.write_bytes(data)
    with pytest.raises(Damaged, match=r"a\.pth \(.*\(archive/data/0 does not match its checksum\); copy it again"):
        read_checkpoint(written)


def test_a_write_that_fails_says_so_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"a.pth cannot be written: No space left on device \(2.0 MB needed, .* MB free"
    ):
        write_whole(path, bytes(2_000_000))
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
