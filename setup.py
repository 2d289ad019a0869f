"""Installs mmdet_lors. Loose bounds fit an existing MMDetection; requirements.txt has the tested versions."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
# Where mim and mmengine look for the configs, tools and model index of an installed package.
MIM = ["configs", "tools", "model-index.yml"]
FOR_DEVELOPERS = ["setup_env.sh", "quickstart.sh", "run_tests.sh", "__pycache__"]


class BuildWithMim(build_py):
    """Puts configs, tools and model index into the package's ``.mim`` folder; an editable install links to them."""

    def run(self) -> None:
        """Build, then fill ``.mim``."""
        super().run()
        folder = (root if self.editable_mode else Path(self.build_lib)) / "mmdet_lors" / ".mim"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in MIM:
            if self.editable_mode:
                (folder / name).symlink_to(Path("..", "..", name))
            elif (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns(*FOR_DEVELOPERS))
            else:
                shutil.copy(root / name, folder / name)


# Read, not imported: importing mmdet_lors needs torch.
version = re.search(r'^__version__ = "(.+)"', (root / "mmdet_lors" / "__init__.py").read_text(), re.M).group(1)

setup(
    name="mmdet_lors",
    version=version,
    description="AdaMixer with LORS, low-rank sharing between decoder stages, for MMDetection 3.x",
    license="Apache-2.0",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildWithMim},
    packages=find_packages(include=["mmdet_lors", "mmdet_lors.*"]),
    python_requires=">=3.10,<3.14",
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
        "safetensors>=0.4",
        "huggingface_hub>=0.20",
        "packaging",
        "rich",
    ],
    extras_require={
        # mmsegmentation imports the other two without asking for them.
        "seg": ["mmsegmentation>=1.2,<2", "ftfy>=6", "regex"],
        "vl": ["transformers>=5,<6"],
        "lora": ["peft>=0.17,<1"],
        "web": ["nicegui>=3,<4", "starlette>=1.6"],
        "tests": ["pytest>=7", "hypothesis>=6", "ruff>=0.6", "mypy>=1.19"],
        "export": ["torch>=2.6", "onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "openvino": ["openvino>=2026"],
    },
)
