"""What a terminal shows of the tools that the quickstart runs: lines that fit, and no warnings that nobody can mend."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import LORS_DIGITS, ROOT, run
from runs import write_config

WARNING = re.compile(r"warn(ing)?\b|deprecat", re.IGNORECASE)
MINE = "pkg_resources is deprecated as an API, said by the user's own config"


def complaints(text: str) -> list[str]:
    """The lines that warn of something; torch lists its compiler's flags, which are no warnings."""
    return [line for line in text.splitlines() if WARNING.search(line) and "CXX_FLAGS" not in line]


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """A config that warns, the work folder of its training in a process of its own, and what this printed."""
    folder = tmp_path_factory.mktemp("run")
    more = f"import warnings\nwarnings.warn({MINE!r})\n"
    more += "train_dataloader['num_workers'] = 1\ndefault_hooks['logger'] = dict(interval=2)\n"
    more += (
        f"test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={str(tiny_digits)!r}))"
    )
    more += f"\ntest_evaluator = dict(ann_file={str(tiny_digits / 'annotations/val.json')!r})\n"
    config = write_config("lors", folder, tiny_digits, more)
    done = run(sys.executable, "tools/train.py", str(config), "--work-dir", str(folder / "work"))
    assert done.returncode == 0, done.stderr[-2000:]
    return config, folder / "work", done.stdout + done.stderr


def test_training_shows_no_warning_but_a_users_own(trained):
    assert complaints(trained[2]) and all(MINE in line for line in complaints(trained[2]))


def test_training_logs_a_line_of_a_screens_width_per_interval(trained):
    _, work, text = trained
    lines = [line for line in text.splitlines() if " eta " in line]
    assert [re.search(r"\[\d\]\[\d/3\]", line).group() for line in lines] == ["[1][2/3]", "[2][2/3]"]
    number = r"\d+\.\d+"
    for line in lines:
        assert re.search(
            rf"\] loss {number} s2 cls {number} bbox {number} iou {number} lr \S+ eta \S+ {number}GB$", line
        )
        assert len(line) <= 120
    scalars = [json.loads(line) for line in next(work.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    names = {f"stage{i}_loss_{loss}" for i in range(3) for loss in ("cls", "bbox", "iou")}
    assert names | {"loss", "lr", "grad_norm", "time", "data_time"} <= scalars[0].keys()


def test_evaluating_with_pictures_shows_no_warning(trained):
    config, work, _ = trained
    checkpoint = Path((work / "last_checkpoint").read_text())
    arguments = [str(config), str(checkpoint), "--work-dir", str(work / "test"), "--show-dir", "pictures"]
    done = run(sys.executable, "tools/test.py", *arguments)
    assert done.returncode == 0 and list(work.glob("test/*/pictures/*.png")), done.stderr[-2000:]
    assert all(MINE in line for line in complaints(done.stdout + done.stderr))


def test_who_asks_for_warnings_gets_them():
    code = f"import mmdet_lors; from mmengine.config import Config; Config.fromfile({str(ROOT / LORS_DIGITS)!r})"
    assert "pkg_resources" in run(sys.executable, "-W", "default", "-c", code).stderr
