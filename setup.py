"""Installs mmdet_lors. Loose bounds fit an existing MMDetection; requirements.txt has the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
# Read, not imported: importing mmdet_lors needs torch.
version = re.search(r'^__version__ = "(.+)"', (root / "mmdet_lors" / "__init__.py").read_text(), re.M).group(1)

setup(
    name="mmdet_lors",
    version=version,
    description="AdaMixer with LORS, low-rank sharing between decoder stages, for MMDetection 3.x",
    license="Apache-2.0",
    packages=find_packages(include=["mmdet_lors", "mmdet_lors.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "mmcv>=2.0.0,<2.2.0",
        "mmengine>=0.10.0,<1.0.0",
        "mmdet>=3.3.0,<4.0.0",
        "numpy>=1.23",
        "scipy>=1.10",
        "pycocotools>=2.0.6",
        "timm>=0.9",
    ],
    extras_require={
        "tests": ["pytest>=7", "ruff>=0.6"],
        "export": ["torch>=2.6", "onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    },
)
