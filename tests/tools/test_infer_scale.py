"""tools/infer.py on many images: what a killed run has found is kept, and several processes find what one does."""

import json
import random
import shutil
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, load_tool, refused, run, write_random_lors
from runs import Run

from mmdet_lors.errors import UserError
from mmdet_lors.inference.records import Records

CONFIG = str(ROOT / LORS_DIGITS)
KILLS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_random_lors(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def folder(tiny_digits, tmp_path_factory) -> Path:
    """100 images, of which every 20th cannot be read."""
    folder = tmp_path_factory.mktemp("many") / "images"
    images = sorted((tiny_digits / "val").iterdir())
    for i in range(100):
        target = folder / f"{i % 3}/{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"no image") if i % 20 == 7 else shutil.copy(images[i % 8], target)
    return folder


@pytest.fixture(scope="module")
def infer(folder, checkpoint):
    """Run the tool with COCO results."""

    def call(out: Path, *arguments: str, processes: int = 1) -> Run:
        words = (CONFIG, checkpoint, "--no-pictures", "--coco", f"{out}.json", "--device", "cpu", *arguments)
        return Run(folder, out, *words, processes=processes, tool="infer.py", option="--out")

    return call


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(infer, tmp_path_factory) -> Path:
    """The results of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert "95 images, " in infer(out, "--batch-size", "4").done().output()
    return out


def same_results(out: Path, expected: Path) -> None:
    found, wanted = rows(out), rows(expected)
    assert sorted(row["image"] for row in found) == sorted(row["image"] for row in wanted)
    places = {row["image"]: row for row in wanted}
    for row in found:
        reference = places[row["image"]]
        assert row.get("error") == reference.get("error")
        for box, other in zip(row.get("boxes", ()), reference.get("boxes", ()), strict=True):
            assert box["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
    results = [json.loads(Path(f"{path}.json").read_text()) for path in (out, expected)]
    counts = [Counter(result["image_id"] for result in some) for some in results]
    assert counts[0] == counts[1] and set(counts[0].values()) == {20}
    assert sorted(path.name for path in out.iterdir()) == ["predictions.jsonl", "predictions.run.json"]


def test_lines_are_in_the_order_of_the_images_with_reasons(alone, folder):
    found = rows(alone)
    assert [row["image"] for row in found] == sorted(map(str, folder.rglob("*.png")))
    errors = [row for row in found if "error" in row]
    assert len(errors) == 5
    assert {row["error"] for row in errors} == {"it cannot be read as an image"}


def test_two_processes_find_what_one_finds(infer, alone, tmp_path):
    two = infer(tmp_path / "out", processes=2).done()
    assert "95 images, " in two.output(0) and "95 images" not in two.output(1)
    same_results(tmp_path / "out", alone)
    assert [row["image"] for row in rows(tmp_path / "out")] == [row["image"] for row in rows(alone)]


def test_killed_at_random_moments_every_image_has_one_result(infer, alone, tmp_path):
    out = tmp_path / "out"
    chance = random.Random()

    def size() -> int:
        return sum(path.stat().st_size for path in out.glob("*.jsonl"))

    ends = []
    for number in range(KILLS):
        job = infer(out, "--resume", "--batch-size", "4", processes=1 + number % 2)
        wanted = size() + chance.randrange(1, (alone / "predictions.jsonl").stat().st_size // KILLS)
        assert job.wait_for(lambda wanted=wanted: size() > wanted)
        job.kill()
        ends.append(size())
    print("bytes at the kills:", ends)
    infer(out, "--resume").done()
    same_results(out, alone)


def test_memory_does_not_grow_with_the_images(folder, checkpoint, tmp_path, monkeypatch):
    used = []
    add = Records.add

    def measured(self, row: dict) -> None:
        add(self, row)
        used.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(Records, "add", measured)
    words = [folder, CONFIG, checkpoint, "--no-pictures", "--coco", tmp_path / "c.json", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words), "--device", "cpu"])
    tracemalloc.start()
    try:
        load_tool("infer.py").main()
    finally:
        tracemalloc.stop()
    kept = sum(len(line) for line in (tmp_path / "predictions.jsonl").open()) / 2
    assert used[-1] - used[len(used) // 2] < kept, "the rows are kept, whose objects are larger than their lines"


def test_results_in_the_way_stay_as_they_are(checkpoint, tiny_digits, alone, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    before = (out / "predictions.jsonl").read_bytes()
    common = ["--no-pictures", "--coco", str(tmp_path / "c.json"), "--out", str(out), "--device", "cpu"]
    plain, other = str(ROOT / PLAIN_DIGITS), str(tiny_digits / "val")
    for words, message in (
        (
            [str(folder), CONFIG, checkpoint],
            "predictions.jsonl has results: go on with --resume, or give another --out",
        ),
        ([str(folder), plain, checkpoint, "--resume"], "is of another run, with config "),
        ([str(folder), CONFIG, checkpoint, "--resume", "--cfg-options", "a=1"], "with --cfg-options None instead of"),
        ([other, CONFIG, checkpoint, "--resume"], "which is not among the inputs"),
    ):
        assert message in refused("infer.py", [*words, *common], monkeypatch, capsys)
        assert (out / "predictions.jsonl").read_bytes() == before and not (tmp_path / "c.json").exists()
    (out / "predictions.jsonl").write_text("{}\n")
    message = refused("infer.py", [str(folder), CONFIG, checkpoint, "--resume", *common], monkeypatch, capsys)
    assert "has a line that is no result" in message


def test_a_line_that_was_cut_is_made_again(tmp_path):
    Records(tmp_path, {}).add(dict(image="0", boxes=[]))
    whole = (tmp_path / "predictions.jsonl").read_text()
    for end in range(1, len(whole)):
        (tmp_path / "predictions.jsonl").write_text(whole + whole[:end].replace("0", "1"))
        records = Records(tmp_path, {})
        records.begin(resume=True)
        assert [row["image"] for row in records.rows()] == ["0"]
        records.add(dict(image="1", boxes=[]))
        assert (tmp_path / "predictions.jsonl").read_text() == whole + whole.replace("0", "1")


def test_records_that_lack_an_image_are_not_merged(tmp_path):
    for rank in range(2):
        Records(tmp_path, {}, rank, 2).add(dict(image=str(rank), boxes=[]))
    with pytest.raises(UserError, match="no process wrote a result of 2"):
        Records(tmp_path, {}).merge("012")
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["predictions.0.jsonl", "predictions.1.jsonl"]
    Records(tmp_path, {}).add(dict(image="1", error="merged before the other files were removed"))
    Records(tmp_path, {}).merge("10")
    assert [(row["image"], "error" in row) for row in rows(tmp_path)] == [("1", True), ("0", False)]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["predictions.jsonl"]


def test_dist_infer(tiny_digits, checkpoint, tmp_path):
    arguments = [str(tiny_digits / "val"), CONFIG, checkpoint, "2", "--json", "--out", str(tmp_path / "out")]
    done = run("bash", "tools/dist_infer.sh", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["image"] for row in rows(tmp_path / "out")] == sorted(map(str, (tiny_digits / "val").iterdir()))
    assert len(list((tmp_path / "out").glob("*.png"))) == 8
    again = run("bash", "tools/dist_infer.sh", *arguments)
    assert again.returncode == 1 and "go on with --resume" in again.stderr and "Traceback" not in again.stderr
