"""Serving LORS folded while a run is evaluated."""

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_lors.lors.serving import serve


@HOOKS.register_module()
class ServeFoldedHook(Hook):
    """Validation and tests run with LORS folded: at plain AdaMixer's speed, with its memory, the weights untouched."""

    priority = "VERY_LOW"

    def before_val_epoch(self, runner: Runner) -> None:
        """Fold, after hooks that swap weights for the evaluation (EMA)."""
        serve(runner.model)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop what was folded."""
        serve(runner.model, False)

    def before_test_epoch(self, runner: Runner) -> None:
        """Fold."""
        serve(runner.model)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop what was folded."""
        serve(runner.model, False)
