"""Annotation files are read once while a run is being made, and nothing of them is left to it."""

import gc
import json

from mmdet_lors.datasets.files import annotation_file, keep, release


def test_a_kept_file_is_read_once_and_let_go_of(tmp_path):
    path = tmp_path / "objects.json"
    images = [dict(id=1, file_name="1.png", width=8, height=8)]
    path.write_text(json.dumps(dict(images=images, annotations=[], categories=[dict(id=1, name="thing")])))
    release()  # what an earlier test may have kept
    assert annotation_file(path) is not annotation_file(path)
    keep()
    kept = annotation_file(path)
    assert annotation_file(path) is kept and gc.get_freeze_count() > 0
    path.write_text(path.read_text() + " ")
    assert annotation_file(path) is not kept
    release()
    assert annotation_file(path) is not kept and gc.get_freeze_count() == 0
