"""Folds LORS while a run is evaluated."""

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_lors.lors.serving import serve


@HOOKS.register_module()
class ServeFoldedHook(Hook):
    """Runs validation and tests with LORS folded: at plain AdaMixer's speed and memory, and with unchanged weights."""

    priority = "VERY_LOW"

    def before_val_epoch(self, runner: Runner) -> None:
        """Fold, after hooks that swap weights for the evaluation, such as EMA."""
        serve(runner.model)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop the folded weights."""
        serve(runner.model, False)

    def before_test_epoch(self, runner: Runner) -> None:
        """Fold."""
        serve(runner.model)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Drop the folded weights."""
        serve(runner.model, False)
