"""tools/studies/decoder_study.py: whole at toy size, and what its page makes of runs."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load_tool, refused
from mmengine.structures import InstanceData

TOOL = "studies/decoder_study.py"
TOY = ["--iterations", "2", "--batch-size", "2", "--train-images", "4", "--val-images", "3", "--size", "32"]
TOY += ["--feature-epochs", "1", "--queries", "5", "--seeds", "1"]


@pytest.fixture
def study():
    return load_tool(TOOL)


@pytest.fixture
def part(study):
    return lambda name: sys.modules[f"decoder_bench.{name}"]


def call(study, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [TOOL, *map(str, arguments)])
    study.main()


def test_the_whole_study_at_toy_size(study, part, monkeypatch, capsys, tmp_path):
    options = [*TOY, "--work-dir", tmp_path / "work", "--out", tmp_path / "page.md"]
    call(study, monkeypatch, *options)
    rows = [row.name for row in part("rows").ROWS]
    runs = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert list(runs) and set(runs) == set(rows)
    assert not [name for name in rows if "failed" in runs[name]["runs"][0]]
    page = (tmp_path / "page.md").read_text()
    assert all(f"| {name} |" in page for name in rows) and "## Runs that are not done" in page
    assert (tmp_path / "page.png").stat().st_size > 1000
    assert capsys.readouterr().out.count(", seed 0: AP ") == len(rows)

    monkeypatch.setattr(study, "one_run", lambda *_: pytest.fail("a finished run was repeated"))
    before = (tmp_path / "page.json").read_text()
    call(study, monkeypatch, *options)
    call(study, monkeypatch, *options, "--page")
    assert (tmp_path / "page.json").read_text() == before and (tmp_path / "page.md").read_text() == page

    assert "has runs of" in refused(TOOL, [*map(str, options), "--iterations", "3"], monkeypatch, capsys)


def found(part, **aps: list[float]) -> dict:
    runs = {name: {(seed, "a"): dict(ap=ap) for seed, ap in enumerate(values)} for name, values in aps.items()}
    return {row.name: runs.get(row.name, {}) for row in part("rows").ROWS}


def test_differences_are_paired_by_seed_with_students_intervals(part):
    difference = part("results").Difference.of(
        found(part, LORS=[0.51, 0.42, 0.33], plain=[0.5, 0.4, 0.3]), "LORS", "plain"
    )
    assert difference == pytest.approx((0.02, 0.02 - 0.0248414, 0.02 + 0.0248414), abs=1e-6)  # 4.3027 * 0.01 / sqrt(3)
    assert str(difference) == "+0.020 [-0.005, +0.045]"
    assert part("results").Difference.of(found(part, LORS=[0.5], plain=[0.5, 0.4]), "LORS", "plain") is None


def test_all_rows_tell_how_much_seeds_change(part):
    runs = found(part, plain=[0.5, 0.4, 0.3], LORS=[0.51, 0.42, 0.33], **{"LORST r1": [0.52, 0.42, 0.32]})
    # What row and seed leave: -0.01, 0, 0.01 thirds of 1, -2 and 1; four degrees of freedom.
    assert part("results").residual(runs) == (pytest.approx((2 * (1 + 4 + 1) / 9 * 1e-4 / 4) ** 0.5), 4)
    difference = part("results").Difference.of(runs, "LORS", "plain")
    assert difference == pytest.approx((0.02, 0.02 - 0.0130883, 0.02 + 0.0130883), abs=1e-6)  # 2.7764 * 0.00471


@pytest.mark.parametrize(
    ("gain", "said"), [(0.02, "**have not converged**"), (0.002, "have converged"), (-0.02, "have not converged")]
)
def test_the_page_says_whether_runs_are_long_enough(part, gain, said):
    runs = {"plain": [0.5, 0.51, 0.49], "LORS": [0.48, 0.5], "LORS, twice as long": [0.485]}
    (text, _) = part("page").convergence(found(part, **runs, **{"plain, twice as long": [0.5 + gain]}))
    assert said in text and f"{gain:+.3f} (plain) and +0.005 (LORS), seeds by 0.014" in text
    assert f"{0.485 - 0.5 - gain:+.3f} after twice the iterations (1 seed)" in text
    assert part("page").convergence(found(part, **runs)) == []


@pytest.mark.parametrize(
    ("low", "high", "reaches", "better"),
    [
        (-0.009, 0.009, "holds here", "cannot be told"),
        (0.001, 0.009, "holds here", "holds here"),
        (-0.005, 0.02, "holds here", "cannot be told"),
        (-0.02, -0.001, "does not hold here", "does not hold here"),
        (-0.02, 0.02, "cannot be told", "cannot be told"),
    ],
)
def test_verdicts(part, low, high, reaches, better):
    difference = part("results").Difference((low + high) / 2, low, high)
    assert (difference.verdict(reaches=True), difference.verdict(reaches=False)) == (reaches, better)


def test_failed_runs_are_listed_and_run_again_and_seeds_are_finished_in_order(part, tmp_path):
    rows, results, runs = part("rows"), part("results"), part("runs")
    kept = results.Results(tmp_path / "page.json", runs.Bench())
    kept.use(dict(ap=0.7, seconds=60, digest="a"))
    outcome = dict(ap=0.5, ap50=0.7, error=0.01, parameters=10**6, seconds=30)
    plain, lors = rows.ROWS[:2]
    kept.add(plain, 0, outcome)
    kept.add(lors, 0, dict(failed="FloatingPointError: loss is nan", seconds=3))
    kept = results.Results(tmp_path / "page.json", runs.Bench())
    todo = [(row.name, seed) for row, seed in kept.missing()]
    assert todo[0] == ("LORS", 0) and ("plain", 0) not in todo
    assert [seed for _, seed in todo] == sorted(seed for _, seed in todo) and todo[-1] == ("LORS", 4)
    page = part("page").page(kept, "command", "x.png")
    assert "- LORS, seed 0: FloatingPointError: loss is nan" in page and "| LORS |" not in page
    # A row whose settings have changed since is another row.
    assert kept.of(replace(plain, warm_up=0.5)) == {}
    assert list(kept.of(replace(plain, what="other words"))) == [(0, "a")]


def test_runs_with_other_features_are_kept_but_never_paired(part, tmp_path):
    rows, results = part("rows"), part("results")
    outcome, names = dict(ap=0.5, seconds=30), ["plain", "LORS"]
    plain, lors = rows.ROWS[:2]
    kept = results.Results(tmp_path / "page.json", rows.Bench())
    kept.use(dict(ap=0.7, seconds=60, digest="a"))
    for row, seed in ((plain, 0), (lors, 0), (plain, 1)):
        kept.add(row, seed, outcome)
    assert [(row.name, seed) for row, seed in kept.missing(names, seeds=2)] == [("LORS", 1)]

    kept = results.Results(tmp_path / "page.json", rows.Bench())
    kept.use(dict(ap=0.71, seconds=60, digest="b"))
    # Seed 0 is complete; seed 1 was begun on features that this machine does not have.
    assert [(row.name, seed) for row, seed in kept.missing(names, seeds=2)] == [("plain", 1), ("LORS", 1)]
    kept.add(lors, 1, outcome | dict(ap=0.4))
    assert results.Difference.of(kept.found(), "LORS", "plain") is None
    kept.add(plain, 1, outcome)
    assert kept.missing(names, seeds=2) == []
    assert results.Difference.of(kept.found(), "LORS", "plain").mean == pytest.approx(-0.05)
    assert len(kept.of(plain)) == 3 and list(kept.content["features"]) == ["a", "b"]


def test_small_plain_decoders_are_as_large_as_lors(part):
    runs, rows = part("runs"), {row.name: row for row in part("rows").ROWS}

    def size(name: str) -> int:
        return runs.Trained(runs.config(runs.Bench(), rows[name].decoder).model, 64, [8, 4, 2]).parameters_of_decoder()

    lors = size("LORS")
    assert lors / size("plain") == pytest.approx(0.32, abs=0.03)  # the paper's 35 / 110
    for name in ("plain, 16 channels", "plain, 32 channels", "plain, 2 stages"):
        assert size(name) / lors == pytest.approx(1, abs=0.1), name


def test_settings_of_the_private_parts_reach_them_alone(part):
    runs, rows = part("runs"), {row.name: row for row in part("rows").ROWS}
    model = runs.Trained(runs.config(runs.Bench(), rows["LORS"].decoder).model, 64, [8, 4, 2])
    for name, ending, times in (("private lr x4", "", 4), ("B lr x16", "B", 16), ("1 / sqrt(r)", "A", 0.5)):
        cfg = runs.config(runs.Bench(), {})
        cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=rows[name].optimizer)
        optimizer = runs.build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, value in model.named_parameters():
            mine = ".private." in parameter and (not ending or f".{ending}" in parameter)
            assert rates[id(value)] == pytest.approx(5e-4 * (times if mine else 1)), parameter


class Says(torch.nn.Module):
    """Predicts what it was told, image by image."""

    def __init__(self, predictions: list[InstanceData]) -> None:
        super().__init__()
        self.predictions = predictions

    @property
    def decoder(self) -> "Says":
        return self

    def start(self, cells, samples):
        return ()

    def predict(self, samples):
        return self.predictions


def test_ap_and_its_error_are_cocos(part, tmp_path):
    images, box = 40, [2.0, 3.0, 12.0, 23.0]
    truth = dict(
        images=[dict(id=i + 1, width=32, height=32, file_name="") for i in range(images)],
        categories=[dict(id=1, name="0")],
        annotations=[dict(id=i + 1, image_id=i + 1, category_id=1, bbox=[2, 3, 10, 20], area=200, iscrowd=0)
                     for i in range(images)],
    )  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    class Features:
        ids = list(range(1, images + 1))

        def __len__(self) -> int:
            return images

        def batch(self, rows):
            return None, list(rows)

    def judged(right: int) -> dict:
        hit = InstanceData(bboxes=torch.tensor([box]), labels=torch.tensor([0]), scores=torch.tensor([0.9]))
        miss = InstanceData(bboxes=torch.zeros(1, 4), labels=torch.tensor([0]), scores=torch.tensor([0.1]))
        says = Says([hit if i < right else miss for i in range(images)])
        return part("runs").judge(says, Features(), tmp_path / "truth.json")

    assert judged(images) == dict(ap=pytest.approx(1), ap50=pytest.approx(1), error=0)
    half = judged(images // 2)  # the recall, in COCO's steps of 0.01, whose standard error is sqrt(0.5 * 0.5 / 40)
    assert half["ap"] == pytest.approx(0.5, abs=0.011) and half["error"] == pytest.approx(0.079, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--jobs", "0"], "must be 1 or more"), (["--page", "--out", "nowhere/page.md"], "has no finished run")],
)
def test_mistakes_are_named(arguments, message, monkeypatch, capsys):
    assert message in refused(TOOL, arguments, monkeypatch, capsys)


def test_a_run_that_diverges_is_a_result(part, monkeypatch, tmp_path):
    runs, plain = part("runs"), part("rows").ROWS[0]
    monkeypatch.setattr(runs, "Features", lambda *_: (_ for _ in ()).throw(FloatingPointError("loss is nan\nmore")))
    assert runs.one_run(runs.Bench(), plain, 0, tmp_path)["failed"] == "FloatingPointError: loss is nan"


def test_the_quickstarts_summary_names_the_studys_means():
    summary = load_tool("analysis_tools/run_summary.py")
    page = (ROOT / "docs/measured/decoder_study.md").read_text()
    found = summary.decoder_study()
    for row in ("plain", "LORS"):
        cells = next(line for line in page.splitlines() if line.startswith(f"| {row} |")).split(" | ")
        assert f"{row} {cells[3].split()[0]} ({cells[4]} runs)" in found
