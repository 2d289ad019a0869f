"""JSON files have null where there is no number, whoever writes them."""

import json

import numpy as np
import pytest
import torch
from mmengine.fileio import dump, load
from mmengine.visualization import Visualizer

from mmdet_lors.valid_json import to_json

NAN, INF = float("nan"), float("inf")


def read(text: str):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (dict(a=1.5, b=[1, "x", None, True]), dict(a=1.5, b=[1, "x", None, True])),
        (dict(a=NAN, b=[INF, -INF, (NAN, 2)]), dict(a=None, b=[None, None, [None, 2]])),
        (dict(a=np.float32(NAN), b=np.float64(0.5), c=np.int64(3)), dict(a=None, b=0.5, c=3)),
        (dict(a=np.array([1, NAN]), b=torch.tensor([INF, 2.0])), dict(a=[1, None], b=[None, 2])),
        ({NAN: 1}, dict(nan=1)),
    ],
)
def test_what_is_no_number_is_null(value, written, tmp_path):
    assert read(to_json(value)) == read(to_json(value, indent=2)) == written
    dump(value, str(tmp_path / "a.json"))  # as mmengine writes logs, metrics and results
    assert read((tmp_path / "a.json").read_text()) == written == load(str(tmp_path / "a.json"))


def test_scalars_of_a_run(tmp_path):
    visualizer = Visualizer(vis_backends=[dict(type="LocalVisBackend")], save_dir=str(tmp_path))
    visualizer.add_scalars(dict(loss=NAN, lr=0.1), step=1, file_path="log.json")
    visualizer.add_scalar("loss", torch.tensor(INF), step=2)
    assert read((tmp_path / "vis_data/log.json").read_text()) == dict(loss=None, lr=0.1, step=1)
    lines = (tmp_path / "vis_data/scalars.json").read_text().splitlines()
    assert [read(line)["loss"] for line in lines] == [None, None]
