"""What every test needs: mmdet's registries, small threads, the golden files."""

from pathlib import Path

import pytest
import torch
from mmdet.utils import register_all_modules

import mmdet_lors  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _registries():
    register_all_modules(init_default_scope=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT
