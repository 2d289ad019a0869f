"""What users install: wheel and sdist, configs inherited from an installed package, versions checked on import."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mmcv
import mmdet
import pytest
import torch
import yaml
from conftest import ROOT
from mmengine.config import Config

import mmdet_lors
from mmdet_lors.compatibility import check_versions

CONFIG = "lors/adamixer-lors_r18_digits.py"
TABLES = "tools/analysis_tools/paper_tables/lors.yml"


def configs() -> set[str]:
    """Every config of the project that can be run."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    return {path for path in found if "_base_" not in path}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    private = shutil.ignore_patterns(".*", "data", "work_dirs", "build", "*.egg-info", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, source, ignore=private)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def installed(distributions, tmp_path_factory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("site")
    wheel = next(distributions.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([str(part) for part in command], check=True)
    return target


def run_installed(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in a folder of the user's, with the installed package before the project's."""
    env = dict(os.environ, PYTHONPATH=str(installed), CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_wheel_and_sdist_hold_all_configs_tools_and_the_model_index(distributions):
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
    assert {f"mmdet_lors/.mim/{name}" for name in configs()} <= inside
    assert {
        f"mmdet_lors/.mim/{name}" for name in ("model-index.yml", "tools/train.py", "tools/dist_train.sh", TABLES)
    } <= inside
    assert not [name for name in inside if "setup_env" in name or "quickstart" in name or name.endswith(".pyc")]
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert configs() <= inside and {"model-index.yml", "tools/train.py", "LICENSE", TABLES} <= inside


def test_a_users_config_inherits_an_installed_one(installed, tmp_path):
    (tmp_path / "my.py").write_text(f'_base_ = "mmdet_lors::{CONFIG}"\nmodel = dict(decoder=dict(num_stages=2))\n')
    code = (
        "import mmdet_lors; from mmengine.config import Config; from mmdet.registry import MODELS\n"
        "print(mmdet_lors.__file__)\n"
        "cfg = Config.fromfile('my.py'); cfg.model.backbone.init_cfg = None\n"
        "cfg.model.decoder.lors.adaptive.groups = 1\n"
        "print(type(MODELS.build(cfg.model)).__name__, len(MODELS.build(cfg.model).decoder.stages))\n"
    )
    done = run_installed(installed, tmp_path, "-c", code)
    file, built = done.stdout.splitlines()[-2:]
    assert file.startswith(str(installed)) and built == "QueryBased 2"
    assert "WARNING" not in done.stdout + done.stderr, "mmengine does not know the scope mmdet_lors"


def test_installed_tools_run_by_name(installed, tmp_path):
    listed = run_installed(installed, tmp_path, "-m", "mmdet_lors", "--help").stdout
    assert "\n  train\n" in listed and "paper_tables" not in listed
    unknown = run_installed(installed, tmp_path, "-m", "mmdet_lors", "trian")
    assert unknown.returncode == 1
    assert unknown.stderr.strip().endswith(
        "error: trian is not a tool of mmdet_lors; python -m mmdet_lors --help lists them"
    )
    (tmp_path / "my.py").write_text(f'_base_ = "mmdet_lors::{CONFIG}"\n')
    report = run_installed(installed, tmp_path, "-m", "mmdet_lors", "analysis_tools/model_report", "my.py")
    assert "652,886" in report.stdout, report.stdout + report.stderr


def test_an_editable_install_finds_its_configs_too(tmp_path):
    (tmp_path / "my.py").write_text(f'_base_ = "mmdet_lors::{CONFIG}"\n')
    inherited, ours = Config.fromfile(tmp_path / "my.py"), Config.fromfile(ROOT / "configs" / CONFIG)
    assert inherited.model.decoder.lors.keys() == ours.model.decoder.lors.keys()
    assert inherited.model._scope_ == "mmdet_lors"


def test_the_model_index_lists_every_config_once():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    files = [yaml.safe_load((ROOT / name).read_text()) for name in index]
    listed = [model["Config"] for file in files for model in file["Models"]]
    assert sorted(listed) == sorted(configs())
    for file in files:
        known = {collection["Name"] for collection in file["Collections"]}
        for model in file["Models"]:
            assert model["In Collection"] in known and model["Name"] == Path(model["Config"]).stem


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        (torch, "2.5.1", "mmdet_lors needs torch >= 2.6, but 2.5.1 is installed: see pytorch.org"),
        (mmcv, "1.7.2", 'needs mmcv >= 2.0.0, < 3.0, but 1.7.2 is installed: pip install "mmcv>=2.0,<2.2"'),
        (mmdet, "3.2.0", 'needs mmdet >= 3.3.0, < 4.0, but 3.2.0 is installed: pip install "mmdet>=3.3,<4"'),
        (mmdet, "4.0.0", "but 4.0.0 is installed"),
    ],
)
def test_versions_that_do_not_fit_are_named_with_the_remedy(package, version, message, monkeypatch):
    monkeypatch.setattr(package, "__version__", version)
    with pytest.raises(ImportError) as error:
        check_versions()
    assert message in str(error.value)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match=r"needs mmcv >= 2\.0\.0, < 3\.0, which is not installed: pip install"):
        check_versions()


def test_versions_that_stand_in_two_places_agree():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[f"ruff=={pins['ruff']}"]] * 2
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mmdet_lors.__version__
