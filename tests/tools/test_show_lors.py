"""Energies, singular values and similarities against those of the weights that the modules themselves make."""

import json
import math

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, is_picture, load_config, load_tool, random_lors, refused
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from mmdet_lors.errors import UserError
from mmdet_lors.lors import LORSA, LORST, share_stack

TOOL = "analysis_tools/show_lors.py"
VIT = "configs/classification/vit-lors_digits.py"


def lorsa(**settings) -> LORSA:
    built = LORSA(5, [(4, 4), (6, 3)], copies=2, num_layers=3, **settings).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return built


@pytest.mark.parametrize("settings", [dict(rank=2, groups=[1, 0, 2]), dict(rank=[1, 2, 3], shared=False)])
def test_energy_of_a_generated_weight_is_its_mean_over_queries(settings):
    """Queries +-sqrt(m) e_j have zero mean and unit covariance, so that the mean over them is the energy, exactly."""
    half = lorsa(**settings)
    queries = math.sqrt(5) * torch.cat([torch.eye(5), -torch.eye(5)]).double()
    for s, report in enumerate(load_tool(TOOL).reports(nn.ModuleList([half]))):
        for i, rank in enumerate(report.ranks):
            energy = half(queries, i)[s].square().sum(dim=(1, 2, 3)).mean().item()
            assert report.total(i) == pytest.approx(energy)
            assert report.shared + report.private(i) + report.cross(i) == pytest.approx(energy)
            assert report.singular_values[i].square().sum().item() == pytest.approx(report.private(i))
            assert len(report.singular_values[i]) == min(rank, half.shapes[s][0])
            if not settings.get("shared", True):
                assert report.shared == report.cross(i) == 0 and report.private_share(i) == 1
        weights = [torch.cat([w, b[:, None]], dim=1) for w, b in (half.fold_for_serving(i)[s] for i in range(3))]
        cosine = [[torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a in weights] for b in weights]
        assert report.similarity.tolist() == [pytest.approx(row) for row in cosine]


def test_energy_of_lorst_is_its_weights():
    half = LORST(7, 5, num_layers=3, rank=2, groups=[1, 2, 0]).double()
    for parameter in half.parameters():
        nn.init.normal_(parameter)
    (report,) = load_tool(TOOL).reports(nn.ModuleList([half]))
    assert report.ranks == [2, 4, 0]
    for i in range(3):
        weight, _ = half.fold(i)
        private = weight - half.shared
        assert report.total(i) == pytest.approx(weight.square().sum().item())
        assert report.private(i) == pytest.approx(private.square().sum().item())
        expected = torch.linalg.svdvals(private)[: report.ranks[i]].tolist()
        assert report.singular_values[i].tolist() == pytest.approx(expected)


def test_equal_stages_have_similarity_1():
    half = lorsa(rank=2)
    for private in half.private[1:]:
        private.load_state_dict(half.private[0].state_dict())
    for report in load_tool(TOOL).reports(nn.ModuleList([half])):
        assert torch.allclose(report.similarity, torch.ones(3, 3, dtype=torch.float64), atol=1e-12)
    fresh = LORST(7, 5, num_layers=2, rank=2)
    (report,) = load_tool(TOOL).reports(nn.ModuleList([fresh]))
    assert report.private_share(1) == report.private(1) == 0
    assert torch.allclose(report.similarity, torch.ones(2, 2, dtype=torch.float64), atol=1e-12)


def test_stack_is_found_by_name():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 4), nn.ReLU()) for _ in range(4)))
    share_stack(layers, ["0"], rank=2, share=[0, 1, 0, 1])
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    found = load_tool(TOOL).reports(layers)
    assert [(report.name, report.unit, report.ranks) for report in found] == [("*.0.weight", "layer", [2, 2])] * 2
    for report, members in zip(found, ((0, 2), (1, 3)), strict=True):
        for i, layer in enumerate(members):
            assert report.total(i) == pytest.approx(layers[layer][0].weight.square().sum().item(), rel=1e-5)


def test_adaptive_weights_have_no_energy():
    layers = nn.Sequential(*(nn.Linear(6, 4) for _ in range(2)))
    share_stack(layers, "weight", rank=2, kind="adaptive")
    with pytest.raises(UserError, match="^0.weight_lorst: adaptive weights depend on the input: there is no weight"):
        load_tool(TOOL).reports(layers)


def test_lors_draws_and_writes_numbers(tmp_path, call_tool, capsys):
    model = random_lors(load_config(LORS_DIGITS).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    call_tool(TOOL, LORS_DIGITS, tmp_path / "model.pth", "--out", tmp_path / "out.png", "--json", tmp_path / "o.json")
    assert is_picture(tmp_path / "out.png")
    found = json.loads((tmp_path / "o.json").read_text())
    assert [entry["name"][:5] for entry in found] == ["M, ch", "S, sp", "W_out"]
    for i in range(3):
        generator = sum(part.square().sum().item() for part in model.decoder.lorsa.fold(i))
        assert sum(entry["stages"][i]["total"] for entry in found[:2]) == pytest.approx(generator, rel=1e-5)
    assert f"{found[2]['stages'][2]['private_share']:.2%}" in capsys.readouterr().out


def test_lors_of_a_shared_stack(tmp_path, call_tool):
    model = MODELS.build(Config.fromfile(ROOT / VIT).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    call_tool(TOOL, VIT, tmp_path / "model.pth", "--out", tmp_path / "out.png", "--json", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())
    assert [entry["name"] for entry in found] == [
        f"network.blocks.*.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert [stage["rank"] for stage in found[0]["stages"]] == [8, 8, 8, 8, 16, 24]
    assert is_picture(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PLAIN_DIGITS, "none.pth"), "has no LORS: its layers share no weight"),
        ((LORS_DIGITS, "none.pth"), "checkpoint none.pth does not exist"),
        (("none.py", "none.pth"), "config none.py does not exist"),
        (("configs/_base_/default_runtime.py", "none.pth"), "has no model"),
        ((LORS_DIGITS, "none.pth", "--json", "x.txt"), "--json x.txt: must end with .json"),
    ],
)
def test_lors_refuses(arguments, message, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    assert message in refused(TOOL, list(arguments), monkeypatch, capsys)
