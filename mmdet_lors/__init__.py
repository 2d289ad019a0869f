"""AdaMixer with LORS for MMDetection 3.x. Importing it registers its parts with mmdet, if that is installed."""

import sys

from .compatibility import check_versions, has_mmdet, hide_others_deprecations

__version__ = "0.1.0"

if has_mmdet() and sys.argv[:1] != ["-m"]:  # python -m mmdet_lors TOOL: see __main__.py
    hide_others_deprecations()
    check_versions()  # Before anything imports mmdet.

    from . import adamixer, datasets, pela, registry, valid_json, visualization, with_lors  # noqa: F401
    from .engine import amp, checkpoint, hooks, log_line, non_finite, zero  # noqa: F401
    from .engine.resume import loops  # noqa: F401
