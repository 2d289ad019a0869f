"""The studies on embedded data: a finished run is not repeated, pages say what was found, errors name the option."""

import sys
from argparse import ArgumentParser
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load_tool, refused
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_lors.analysis import study as shared
from mmdet_lors.errors import UserError

TOOL = "studies/pela_study.py"


@pytest.fixture
def pela():
    return load_tool(TOOL)


@pytest.fixture
def runs(pela):
    return sys.modules["pela_runs"]


def test_a_finished_run_is_not_repeated_and_a_failed_one_is(tmp_path):
    calls = []

    def fails() -> dict:
        calls.append("fails")
        raise UserError("no")

    def works() -> dict:
        calls.append("works")
        return dict(top1=1.5)

    with pytest.raises(UserError):
        shared.once(tmp_path / "run", fails)
    assert [shared.once(tmp_path / "run", works) for _ in range(2)] == [dict(top1=1.5)] * 2
    assert calls == ["fails", "works"]


def test_runs_side_by_side_come_back_in_their_order():
    assert list(shared.side_by_side(lambda n: dict(n=n), [3, 1, 2], jobs=2)) == [(n, dict(n=n)) for n in (3, 1, 2)]


def test_options_of_a_study_are_named_after_it():
    parser = ArgumentParser()
    load_tool("studies/options.py").add_study_options(parser, "some_study")
    args = parser.parse_args([])
    assert (str(args.work_dir), args.out, args.jobs) == ("work_dirs/some_study", ROOT / "docs/some_study.md", 2)


def test_a_tool_that_fails_names_its_log(tmp_path):
    with pytest.raises(UserError, match=r"-c import sys; sys.exit\(3\) ended with exit status 3; see .*log.txt"):
        shared.call("-c", "import sys; sys.exit(3)", log=tmp_path / "log.txt")


@pytest.mark.parametrize("name", ["PLAIN", "DISTILLER"])
def test_schedule_of_the_configs_own_length_is_the_configs(runs, name):
    path = getattr(runs, name)
    cfg, merged = Config.fromfile(ROOT / path), Config.fromfile(ROOT / path)
    options = [option.split("=") for option in runs.schedule(path, runs.epochs_of(path), seed=0)]
    merged.merge_from_dict({key: int(value) for key, value in options if key.startswith("param_scheduler")})
    assert merged.param_scheduler == cfg.param_scheduler
    assert f"train_cfg.max_epochs={cfg.train_cfg.max_epochs}" in ["=".join(option) for option in options]


def test_shorter_schedule_keeps_the_share_of_warm_up(runs):
    options = runs.schedule(runs.PLAIN, 30, seed=7)
    assert {"param_scheduler.0.end=2", "param_scheduler.1.begin=2", "param_scheduler.1.T_max=28"} < set(options)
    assert "randomness.seed=7" in options


def outcomes(*top1: float) -> list[dict]:
    return [dict(top1=value) for value in top1]


def test_order_of_table_7(pela):
    paper = {v.name: outcomes(v.paper[0], v.paper[0]) for v in pela.VARIANTS if v.paper}
    rows, in_order, every_seed = pela.compare(paper, 0)
    assert in_order and every_seed
    assert rows[0] == ["plain over both", "+0.84", "+0.84", "+0.84, +0.84", "as in the paper"]
    assert [row[0] for row in rows[1:]] == [
        "both over feature", "feature over perturbation", "perturbation over compressed"
    ]  # fmt: skip
    assert pela.compare(paper, 1)[1:] == (False, False)  # DeiT's order is not Swin's.

    noisy = dict(paper, feature=outcomes(80.0, 81.9))
    rows, in_order, every_seed = pela.compare(noisy, 0)
    assert in_order and not every_seed and rows[1][2:] == ["+0.01", "+0.96, -0.94", "as in the paper; seeds disagree"]
    equal = dict(paper, feature=paper["both"])
    rows, in_order, _ = pela.compare(equal, 0)
    assert not in_order and rows[1][-1] == "equal"
    reversed_ = dict(paper, both=outcomes(80.0, 80.0))
    assert pela.compare(reversed_, 0)[0][1][-1] == "the other way round"


@pytest.fixture
def tools(pela, runs, monkeypatch):
    """Stand-ins for train.py, test.py and extract_student.py; lists what they are called with."""
    calls, accuracies = [], {"vit_digits": 98.0, "compressed": 50.0, "base-loss": 90.0, "both": 95.0}

    def train(config, folder, options):
        calls.append(("train", folder.name, options))
        epochs = next(option.split("=")[1] for option in options if option.startswith("train_cfg.max_epochs="))
        if config == runs.PLAIN:
            model = MODELS.build(shared.read(config).model)
            torch.save(dict(state_dict=model.state_dict()), folder / f"epoch_{epochs}.pth")
        logs = folder / "20260101_000000/vis_data"
        logs.mkdir(parents=True)
        logged = [dict(loss=2.0, loss_feature=0.5, loss_perturbation=0.25, lr=0.1), {"accuracy/top1": 1.0}]
        logged.insert(1, dict(logged[0], loss=1.0))
        (logs / "scalars.json").write_text("\n".join(runs.json.dumps(line) for line in logged))
        return 10.0

    def evaluate(config, checkpoint, folder, options=()):
        calls.append(("test", folder.name, options))
        return {"accuracy/top1": accuracies.get(folder.name.split("_seed")[0], 94.0), "accuracy/top5": 99.0}

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "evaluate", evaluate)
    monkeypatch.setattr(runs, "call", lambda *command, log: calls.append(("extract", *command[1:])))
    monkeypatch.setattr(pela, "RATIOS", (2,))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return calls


def test_pela_study_runs_and_reports_what_it_found(pela, tools, tmp_path, monkeypatch):
    out = tmp_path / "page.md"
    arguments = ["--seeds", "1", "--epochs", "2", "--teacher-epochs", "2", "--ratio", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments, "--work-dir", str(tmp_path / "work")])
    pela.main()
    trained = [(name, options) for kind, name, options in tools if kind == "train"]
    assert trained[0][0] == "vit_digits_seed-0" and len(trained) == 6
    other = [options for name, options in trained if name == "both_seed-0" and "model.ratio=2" in options]
    assert len(other) == 1 and not any("loss=None" in option for option in other[0])
    trained = {name: options for name, options in trained if options is not other[0]}
    assert "model.feature_loss=None" in trained["perturbation_seed-0"]
    assert not any(option.startswith("model.feature_loss") for option in trained["feature_seed-0"])
    assert {"model.feature_loss=None", "model.perturbation_loss=None"} < set(trained["base-loss_seed-0"])
    assert not any("loss=None" in option for option in trained["both_seed-0"])
    assert all(
        f"model.teacher_checkpoint={tmp_path / 'work'}/2-epochs/vit_digits_seed-0/epoch_2.pth" in options
        for name, options in trained.items()
        if not name.startswith("vit_digits")
    )
    page = out.read_text()
    assert "| plain | the teacher, not compressed | 680,170 | 98.00 | 98.00 | 99.00 | 10 | 81.80 | 83.50 |" in page
    assert "| both | and both | 96,106 | 95.00 | 95.00 | 99.00 | 10 | 80.96 | 82.54 |" in page
    assert "| 8 | 96,106 | 50.00 | 95.00 | 95.00 | -3.00 |" in page and "| 2 | 346,090 | 50.00 | 95.00 |" in page
    assert "| base loss | 2.0000 | 1.0000 |" in page
    assert "The same top-1 for every seed have `feature` and `perturbation`." in page
    assert "Our means are **not** in the order of DeiT-Base's column." in page  # feature and perturbation are equal

    done = len(tools)
    pela.main()
    assert len(tools) == done and out.read_text() == page


def test_factorised_model_is_nearer_to_the_plain_one_at_a_lower_ratio(runs):
    model = MODELS.build(shared.read(runs.PLAIN).model).eval()
    images = torch.randn(2, 1, 32, 32)
    small, large = (runs.factorised(model.state_dict(), ratio) for ratio in (12, 1.01))
    with torch.no_grad():
        expected, *found = (m(images) for m in (model, large, small))
    errors = [((f - expected).norm() / expected.norm()).item() for f in found]
    assert 0 < errors[0] < errors[1]
    assert sum(p.numel() for p in small.parameters()) == 69_610


def test_plain_models_of_the_classification_study_serve_when_they_are_as_long(runs, tmp_path):
    study = runs.Study(12, 20, runs.epochs_of(runs.PLAIN), tmp_path / "work", tmp_path / "teachers")
    assert study.teacher(1) == tmp_path / "teachers/vit_digits_seed-1/epoch_60.pth"
    shorter = replace(study, teacher_epochs=6)
    assert shorter.teacher(1) == tmp_path / "work/6-epochs/vit_digits_seed-1/epoch_6.pth"
    both = runs.TRAINED[-1]
    assert len({s.folder(both, 0) for s in (study, shorter, replace(study, ratio=8), replace(study, epochs=5))}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds and --jobs must be 1 or more"),
        (["--epochs", "1"], "--epochs and --teacher-epochs must be 2 or more"),
        (["--ratio", "1000"], "ratio 1000.0 leaves network.blocks.0.attn.qkv"),
    ],
)
def test_pela_study_refuses(arguments, message, monkeypatch, capsys):
    assert message in refused(TOOL, arguments, monkeypatch, capsys)


def test_compression_study_runs_and_reports_what_it_found(tmp_path, monkeypatch):
    tool, name = load_tool("studies/compression_study.py"), "studies/compression_study.py"
    calls: list[tuple] = []

    def compress(script: str, config: str, checkpoint: str, out: str, *options: str, log) -> None:
        calls.append((config, options))
        size = 40 if "--images" in options else 30
        torch.save(dict(state_dict=dict(weight=torch.zeros(size))), out)

    def train(config: str, folder, options) -> float:
        epochs = next(option.split("=")[1] for option in options if ".checkpoint.interval=" in option)
        torch.save(dict(state_dict=dict(weight=torch.zeros(100))), folder / f"epoch_{epochs}.pth")
        calls.append(("train", options))
        return 1.0

    def evaluate(config: str, checkpoint, folder) -> dict:
        value = 98.0 if "ratio" not in str(folder) else 90.0 if folder.name == "recovery" else 50.0
        return {"accuracy/top1": value, "coco/bbox_mAP": value / 100}

    for function, stand_in in (("call", compress), ("train", train), ("evaluate", evaluate)):
        monkeypatch.setattr(tool, function, stand_in)
    out = tmp_path / "page.md"
    arguments = ["--seeds", "2", "1", "--jobs", "1", "--recover", "1", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--work-dir", str(tmp_path / "work")])
    tool.main()
    budgets = [options for _, options in calls if "--params" in options]
    assert len(budgets) == 2 * 4 + 3 and all(options[:2] == ("--params", "40") for options in budgets)
    assert sum("--convolutions" in options for _, options in calls) == 3 * 3
    recoveries = [options for what, options in calls if what == "train" and any("load_from" in o for o in options)]
    assert len(recoveries) == 4 * 3  # the first classifier's alone
    page = out.read_text()
    assert "| 12 | calibrated, budget | 30 | 50.00 | 50.00, 50.00 | 90.00 | 90.00 |" in page
    assert "| 4 | plain SVD | 40 | 0.500 | 0.500 |\n" in page
    assert "|  | not compressed | 100 | 0.980 | 0.980 |\n" in page and out.with_suffix(".png").is_file()

    done = len(calls)
    tool.main()
    assert len(calls) == done and out.read_text() == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "1"], "--seeds and --jobs must be 1 or more"),
        (["--recovery", "1"], "--recovery must be 2 or more: the first epoch warms up"),
    ],
)
def test_compression_study_refuses(arguments, message, monkeypatch, capsys):
    assert message in refused("studies/compression_study.py", arguments, monkeypatch, capsys)


def test_recovery_warms_up_to_its_rate():
    study = load_tool("studies/compression_study.py")
    classifier, detector = (study.short_schedule(subject.config, 5) for subject in study.SUBJECTS)
    cosine = ["param_scheduler.1.end=5", "param_scheduler.1.T_max=4"]
    assert classifier == ["param_scheduler.0.end=1", "param_scheduler.1.begin=1", *cosine]
    assert detector == ["param_scheduler.1.end=5", "param_scheduler.1.T_max=5"]  # its warm-up is 100 iterations


def test_lora_study_trains_what_its_rows_say(tmp_path):
    study, trained = load_tool("studies/lora_study.py"), []
    for name, line in study.VARIANTS.items():
        (tmp_path / "config.py").write_text(
            f"_base_ = {str(ROOT / study.LORA)!r}\nmodel = dict(checkpoint=None)\n{line}\n"
        )
        model = MODELS.build(Config.fromfile(tmp_path / "config.py").model)
        trained.append({key for key, p in model.named_parameters() if p.requires_grad})
        if name == "everything":
            assert trained[-1] == {key for key, _ in model.named_parameters()}
    classes, adapters, everything = trained
    assert classes == {f"decoder.stages.{i}.cls_branch.3.{p}" for i in range(3) for p in ("weight", "bias")}
    assert classes < adapters and any("lora_A" in key for key in adapters) and not adapters <= everything


def test_lora_study_page():
    study = load_tool("studies/lora_study.py")
    base = dict(old=46.6, new=0.0, all=37.3, bytes=1000)
    variant = dict(old=45.52, new=30.93, all=42.5, bytes=186, parameters=12345, merged=42.6)
    page = study.page(base, {"and adapters": variant}, (12, 4), 2)
    assert "| nothing: the detector of 0 to 7 |  | 46.6 | 0.0 | 37.3 | 1,000 |  |  |" in page
    assert "| and adapters | 12,345 | 45.5 | 30.9 | 42.5 | 186 | 18.60 % | 42.6 |" in page
    assert "--base-epochs 12 --epochs 4 --jobs 2" in page
