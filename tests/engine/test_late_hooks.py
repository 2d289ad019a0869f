"""What a step computes is read when the next one is under way, and nobody can tell: same log, same checkpoints."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_non_finite import runner
from torch import Tensor, nn

from mmdet_lors.engine.late_hooks import LateRuntimeInfoHook
from mmdet_lors.errors import UserError

CHECKPOINTS = dict(type="ReliableCheckpointHook", by_epoch=False, interval=2, max_keep_ckpts=-1)


class Norms(BaseModel):
    """Batch norm, whose statistics a single NaN spoils, and what is logged: a loss, an accuracy and a number."""

    def __init__(self, nan_from: float = torch.inf) -> None:
        super().__init__()
        self.norm, self.last, self.nan_from = nn.BatchNorm1d(3), nn.Linear(3, 1), nan_from

    def forward(self, inputs: Tensor, data_samples: list, mode: str) -> dict:
        x = torch.stack(list(inputs))
        loss = self.last(self.norm(torch.where(x < self.nan_from, x, torch.nan))).square().mean()
        return dict(loss_square=loss, accuracy=x.max())

    def parse_losses(self, losses: dict) -> tuple:
        loss, logged = super().parse_losses(losses)
        return loss, dict(logged, number=3)


def run(work: Path, info: type, interval: int, model: nn.Module | None = None) -> Runner:
    torch.manual_seed(0)
    hooks = dict(runtime_info=dict(type=info.__name__), checkpoint=CHECKPOINTS)
    return runner(work, model=model or Norms(), interval=interval, default_hooks=hooks)


def history(hub: dict | Runner) -> dict:
    scalars = hub["log_scalars"] if isinstance(hub, dict) else hub.message_hub.log_scalars
    return {name: buffer.data[0].tolist() for name, buffer in scalars.items() if "time" not in name}


@pytest.mark.parametrize("interval", [1, 4, 100])
def test_the_log_and_every_checkpoint_have_what_mmengines_hook_gives(interval, tmp_path):
    ours, theirs = [run(tmp_path / hook.__name__, hook, interval) for hook in (LateRuntimeInfoHook, RuntimeInfoHook)]
    for made in (ours, theirs):
        made.train()
    assert history(ours) == history(theirs)
    names = {"lr", "loss", "loss_square", "accuracy", "number", "grad_norm"}
    assert set(history(ours)) == {f"train/{name}" for name in names} and len(history(ours)["train/loss"]) == 6
    for step in (2, 4, 6):
        hubs = [
            torch.load(Path(m.work_dir, f"iter_{step}.pth"), weights_only=False)["message_hub"] for m in (ours, theirs)
        ]
        assert history(hubs[0]) == history(hubs[1]) and len(history(hubs[0])["train/loss"]) == step


@pytest.mark.parametrize(("step", "saved"), [(2, []), (3, [2]), (4, [2]), (6, [2, 4])])
def test_no_checkpoint_is_written_after_a_nan(step, saved, tmp_path):
    """After steps 2, 4 and 6, of images with values from 1 on, two a step; a NaN spoils batch norm for good."""
    made = run(tmp_path, LateRuntimeInfoHook, 100, Norms(nan_from=2 * step))
    with pytest.raises(UserError, match=f"loss is nan at epoch 1, iteration {step}, .*output of norm"):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [f"iter_{i}.pth" for i in saved]


class Graphs(Hook):
    """Counts what hooks keep of a step's graph."""

    priority = "LOWEST"
    kept = 0

    def after_train_iter(self, runner: Runner, **_) -> None:
        (info,) = [hook for hook in runner.hooks if isinstance(hook, LateRuntimeInfoHook)]
        self.kept += sum(v.requires_grad for v in (info.unread or [{}])[0].values() if isinstance(v, Tensor))


def test_no_graph_is_kept_until_the_next_step(tmp_path):
    made = run(tmp_path, LateRuntimeInfoHook, 100)
    made.register_hook(graphs := Graphs())
    made.train()
    assert graphs.kept == 0
