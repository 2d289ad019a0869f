"""``mmdet_lors.lors`` and PELA's factorisation in an interpreter that has torch, and nothing else of what runs need."""

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import sys
for name in ("mmdet", "mmcv", "mmengine", "timm", "pycocotools", "numpy", "packaging"):
    sys.modules[name] = None  # as if it were not installed
import torch
import mmdet_lors.lors, mmdet_lors.pela

layers = [torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)]
mmdet_lors.lors.share_stack(layers, "0", rank=2)
compressed, _ = mmdet_lors.pela.compress(torch.nn.Sequential(torch.nn.Linear(16, 16)), ratio=2)
assert isinstance(compressed[0], mmdet_lors.pela.LowRankLinear), compressed
print("done")
"""


def test_lors_and_the_factorisation_need_torch_alone():
    loaded = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout == "done\n"
