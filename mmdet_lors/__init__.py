"""AdaMixer with LORS for MMDetection 3.x. Importing it registers its parts with mmdet, if that is installed."""

import sys

from .compatibility import check_versions, has_mmdet, hide_others_deprecations

__version__ = "0.1.0"

# For ``python -m mmdet_lors``, Python imports the package before it runs __main__.py, which forgets this import: a tool
# reads its command line before it imports torch. ``-m`` of a package that imports this one is another matter.
_argv = getattr(sys, "argv", [])
_for_main = _argv[:1] == ["-m"] and sys.orig_argv[-len(_argv) :][:1] == ["mmdet_lors"]

if has_mmdet() and not _for_main:
    hide_others_deprecations()
    check_versions()  # Before anything imports mmdet.

    from . import adamixer, datasets, pela, registry, valid_json, visualization, with_lora, with_lors  # noqa: F401
    from .engine import amp, checkpoint, hooks, late_hooks, log_line, non_finite, parameter_groups, zero  # noqa: F401
    from .engine.resume import loops  # noqa: F401
