"""Evaluation runs folded, and leaves nothing of it behind."""

from types import SimpleNamespace

import torch
from conftest import LORS_DIGITS, load_config, random_lors

from mmdet_lors.engine.hooks import ServeFoldedHook


def test_validation_and_test_run_folded_and_end_factored():
    cfg = load_config(LORS_DIGITS)
    model = random_lors(cfg.model)
    runner, hook = SimpleNamespace(model=model), ServeFoldedHook()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for start, end in (
        (hook.before_val_epoch, hook.after_val_epoch),
        (hook.before_test_epoch, hook.after_test_epoch),
    ):
        start(runner)
        model.eval()  # as mmengine's loops do after the hook
        assert model.decoder.lorsa.folded is not None and model.decoder.lorst.folded is not None
        end(runner)
        assert model.decoder.lorsa.folded is None and model.decoder.lorst.folded is None
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)


def test_every_run_has_the_hooks():
    hooks = [hook["type"] for hook in load_config(LORS_DIGITS).custom_hooks]
    assert hooks == ["ServeFoldedHook", "StopOnNonFiniteHook"]
