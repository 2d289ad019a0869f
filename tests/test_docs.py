"""The documentation: it builds, its configs build, its commands are commands of the tools."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_tool
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from mmdet_lors.engine.build import build_without_weights

AT_THE_TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*AT_THE_TOP, *sorted((ROOT / "docs").glob("*.md"))]
OURS = ["README.md", "first_hour.md", "custom_data.md", "recipes.md"]
LAUNCHERS = {f"{how}_{tool}.sh": tool for how in ("dist", "slurm") for tool in ("train", "test", "infer")}
R50 = "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def configs() -> list:
    """Every config on a page: a Python block that inherits."""
    found = [(page, code) for page in PAGES for code in blocks(page, "python") if code.startswith("_base_")]
    return [pytest.param(code, id=f"{page.name}-{i}") for i, (page, code) in enumerate(found)]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's shell blocks that starts one of the project's tools, in words."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words[:3] == ["python", "-m", "mmdet_lors"] and words[3:] != ["--help"]:
                words[:4] = ["python", f"tools/{words[3]}.py"]
            if len(words) > 1 and words[0] in ("python", "bash") and words[1].startswith("tools/"):
                found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def options_of():
    """Tool -> its options, from --help; of a shell script, from its text."""
    known = {}

    def options(tool: str, capsys, monkeypatch) -> set[str]:
        path = Path(tool)
        if path.name in LAUNCHERS:
            path = path.with_name(f"{LAUNCHERS[path.name]}.py")
        if path not in known:
            if path.suffix == ".sh":
                text = (ROOT / path).read_text()
            else:
                monkeypatch.setattr(sys, "argv", [str(path), "--help"])
                monkeypatch.syspath_prepend(ROOT / path.parent)  # some import their neighbours
                module = load_tool(str(path.relative_to("tools")))
                capsys.readouterr()
                with pytest.raises(SystemExit) as stop:
                    module.main()
                assert not stop.value.code
                text = capsys.readouterr().out
            known[path] = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        return known[path]

    return options


def test_the_site_builds_without_a_warning(tmp_path, capsys):
    for needed in ("myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(needed)
    from sphinx.cmd.build import build_main

    failed = build_main(["-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)])
    assert not failed, capsys.readouterr().err
    for page in ROOT.glob("docs/**/*.md"):
        assert (tmp_path / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    reference = "".join(page.read_text() for page in (tmp_path / "reference").glob("*.html"))
    for module in (ROOT / "mmdet_lors").glob("*/[!_]*.py"):
        assert module.parent.name == "analysis" or f"mmdet_lors.{module.parent.name}.{module.stem}" in reference, module


@pytest.mark.parametrize(("page", "at_least"), zip(AT_THE_TOP, (10, 3), strict=True))
def test_links_at_the_top_lead_somewhere(page, at_least):
    targets = [target for target in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in target]
    assert len(targets) > at_least
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("code", configs())
def test_a_config_of_the_documentation_builds(code, tmp_path):
    (tmp_path / "my.py").write_text(code)
    cfg = Config.fromfile(tmp_path / "my.py").model
    if "checkpoint" in cfg:  # WithLoRA's, which is read as it is built
        torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / cfg.checkpoint)
        cfg.checkpoint = str(tmp_path / cfg.checkpoint)
    model = build_without_weights(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e5


def test_the_recipe_of_learning_rates_freezes_and_slows_what_it_says(tmp_path):
    [code] = [code for code in blocks(ROOT / "docs" / "recipes.md", "python") if "lr_mult" in code]
    (tmp_path / "my.py").write_text(code)
    cfg = Config.fromfile(tmp_path / "my.py")
    model = MODELS.build(dict(cfg.model, backbone=dict(cfg.model.backbone, init_cfg=None)))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in rates if name.startswith("backbone.")]
    assert {rates[name] for name in rates if name.startswith("neck.")} == {2.5e-6}
    assert [name for name in rates if rates[name] == 0] == ["decoder.lorst.shared"]
    assert rates["decoder.lorst.bias.0"] == rates["decoder.lorsa.shared.weight"] == 2.5e-5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_files_and_options_that_exist(page, options_of, capsys, monkeypatch):
    for tool, *arguments in commands(page):
        assert (ROOT / tool).is_file(), tool
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        known = options_of(tool, capsys, monkeypatch)
        assert given <= known, f"{tool} has no {', '.join(given - known)}"
        files = [word for word in arguments if word.startswith("configs/")]
        assert not [word for word in files if not (ROOT / word).is_file()]


@pytest.mark.parametrize("name", OURS)
def test_settings_on_the_command_line_have_a_place_in_their_config(name):
    for tool, *arguments in commands(ROOT / "docs" / name if name != "README.md" else ROOT / name):
        if "--cfg-options" not in arguments:
            continue
        config = next((word for word in arguments if word.startswith("configs/")), R50)
        cfg = Config.fromfile(ROOT / config)
        for setting in arguments[arguments.index("--cfg-options") + 1 :]:
            if setting.startswith("--"):
                break
            *parents, last = setting.partition("=")[0].split(".")
            node = cfg
            for parent in parents:
                assert parent in node, f"{tool} {config}: {setting}"
                node = node[parent]
            assert parents or last in ("load_from", "work_dir"), setting


def test_what_pages_import_from_this_project_is_there():
    lines = {
        line
        for page in PAGES
        for code in blocks(page, "python")
        for line in re.findall(r"^(?:from mmdet_lors\S* import .+|import mmdet_lors\S*)$", code, re.M)
    }
    assert len(lines) > 3
    for line in sorted(lines):
        exec(line, {})
