"""The versions that mmdet_lors works with, checked when it is imported."""

import warnings
from importlib import import_module
from importlib.util import find_spec

RANGES = {
    "torch": ("2.6", None, "see pytorch.org"),
    "mmengine": ("0.10.0", "1.0", 'pip install "mmengine>=0.10,<1"'),
    "mmcv": ("2.0.0", "3.0", 'pip install "mmcv>=2.0,<2.2"'),
    "mmdet": ("3.3.0", "4.0", 'pip install "mmdet>=3.3,<4"'),
}
"""Name -> lowest version, first version that is too new, remedy. mmdet itself decides which mmcv fits."""

OTHERS_DEPRECATIONS = (
    ("pkg_resources is deprecated", UserWarning, r"mmengine\.|importlib"),  # as mmengine looks for an installed package
    ("torch.meshgrid: in an upcoming release", UserWarning, r"torch\.functional"),  # mmdet's DETRs
    (r"`torch\.cuda\.amp\.", FutureWarning, r"mm(engine|cv|det|seg)\."),  # float16 on a GPU
)
"""Warnings, by message, category and module, of packages about each other, which their users can do nothing about."""


def hide_others_deprecations() -> None:
    """Do not print what :data:`OTHERS_DEPRECATIONS` lists, unless Python's -W, or another filter, asks for it."""
    for message, category, module in OTHERS_DEPRECATIONS:
        warnings.filterwarnings("ignore", message, category, module, append=True)


def has_mmdet() -> bool:
    """Whether mmdet can be imported; without it, only the parts of ``lors`` and ``pela`` that need only torch work."""
    try:
        return find_spec("mmdet") is not None
    except ImportError:
        return False


def check_versions() -> None:
    """Import every package of :data:`RANGES` and check its version.

    Raises:
        ImportError: one is missing or out of its range, or mmdet refuses the installed mmcv or mmengine; says what to
            install.
    """
    from packaging.version import Version  # Not in every environment that has torch.

    for name, (first, too_new, remedy) in RANGES.items():
        wanted = f"{name} >= {first}" + (f", < {too_new}" if too_new else "")
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f"mmdet_lors needs {wanted}, which is not installed: {remedy}") from None
        except AssertionError as error:
            raise ImportError(f"mmdet_lors cannot use {name}: {error}") from None
        if Version(version) < Version(first) or (too_new and Version(version) >= Version(too_new)):
            raise ImportError(f"mmdet_lors needs {wanted}, but {version} is installed: {remedy}")
