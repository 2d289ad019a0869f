"""docs/pela_recipes.md: the code of its vision-language recipe is run, and what it says is so."""

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmengine.utils import is_installed

from mmdet_lors.pela import LowRankLinear

pytestmark = pytest.mark.skipif(
    not is_installed("transformers"), reason="transformers is not installed: pip install -e .[vl]"
)
PAGE = ROOT / "docs/pela_recipes.md"
PAPER = {"retrieval": (419, 173), "VQA": (581, 259)}
"""Millions of parameters, ALBEF and PELA: Tables 4 and 5."""


def blocks(language: str) -> list[str]:
    """The page's blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> SimpleNamespace:
    """The names that the page's code leaves behind, run from top to bottom, and what each block printed."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("page")
    names, printed = {"__name__": "page"}, []
    here = os.getcwd()
    os.chdir(folder)
    try:
        for i, block in enumerate(blocks("python")):
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(block, f"{PAGE.name}, block {i}", "exec"), names)
            printed.append(out.getvalue())
    finally:
        os.chdir(here)
    return SimpleNamespace(**names, printed=printed, folder=folder)


def test_it_prints_what_the_page_says(page):
    assert len(page.printed) == 4
    assert [page.printed[1]] == blocks("text")


def test_the_step_has_the_releases_weights_and_rates(page):
    assert (page.feature_loss.loss_weight, page.feature_loss.reading) == (0.1, "code")
    assert (page.perturbation_loss.eps, page.perturbation_loss.reading) == (1e-3, "code")
    (group,) = page.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], page.scheduler.eta_min) == (1e-4, 0.02, 1e-5)
    whole = {name: m.out_features for name, m in page.student.named_modules() if type(m) is torch.nn.Linear}
    assert {name for name, outputs in whole.items() if outputs >= 10} == {"text.cls.predictions.decoder"}
    assert "itm_head" in whole


def test_a_third_is_the_papers(page):
    """At full size: every Linear at a third, and the paper's totals, which count a momentum copy."""
    found = re.findall(r"^(\w+), with copy +([\d.]+) M -> +([\d.]+) M", page.printed[1], re.M)
    assert {task: (round(float(before)), round(float(after))) for task, before, after in found} == PAPER
    assert "171 Linears keep 33.3% of their weights" in page.printed[1]
    count = sum(p.numel() for p in page.model.parameters())
    whole_third = sum(p.numel() for p in page.third.parameters())
    assert count == 210_183_485 and whole_third == 70_017_853 and whole_third < count / 3


def test_every_linear_of_the_blocks_is_compressed(page):
    whole = [name for name, m in page.student.named_modules() if isinstance(m, torch.nn.Linear)]
    assert whole == ["text.cls.predictions.decoder", "itm_head"]
    text = page.student.text
    assert text.cls.predictions.decoder.weight is text.bert.embeddings.word_embeddings.weight
    low = [m for m in page.student.modules() if isinstance(m, LowRankLinear)]
    # 6 per layer, 4 more where text attends to the image; the head of masked words and two projections.
    assert len(low) == len(page.layers) == len(page.pairs) == 4 * 6 + 4 * 6 + 2 * 4 + 3


def test_one_step_trains_all_of_the_student_and_nothing_of_the_teacher(page):
    assert page.losses.keys() == {"contrast", "matching", "masked_words", "features", "weights"}
    assert all(torch.isfinite(loss) and loss > 0 for loss in page.losses.values())
    without = [name for name, p in page.student.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias moves all of a query's logits alike, which softmax does not see.
    assert [name for name in without if not re.search(r"(key|k_proj)\.bias$", name)] == []
    assert all(p.grad is None and not p.requires_grad for p in page.teacher.parameters())


def test_features_are_compared_after_every_layer(page):
    with page.record_tokens(page.teacher, page.BLOCKS) as tokens, torch.no_grad():
        page.teacher(**page.batch)
    # Four layers of the ViT, two of the text alone, two with the right image and two with the wrong one.
    assert [t.shape[1] for t in tokens] == [1 + (32 // 16) ** 2] * 4 + [12] * 6
    # Right and wrong image come to the same text, and leave with another one.
    assert not torch.allclose(tokens[-1], tokens[-3], atol=1e-3)


def test_text_is_read_both_ways(page):
    """transformers calls a BERT with attention to images a decoder; ALBEF's is none."""
    changed = dict(page.batch, tokens=page.batch["tokens"].clone())
    changed["tokens"][:, -1] += 1
    first = []
    for batch in (page.batch, changed):
        with page.record_tokens(page.teacher, page.BLOCKS) as tokens, torch.no_grad():
            page.teacher(**batch)
        first.append(tokens[4][:, 0])
    assert not torch.equal(*first)
    # What the mask leaves out is not read at all.
    mask = page.batch["mask"].clone()
    mask[:, -1] = 0
    first = []
    for batch in (page.batch, changed):
        with page.record_tokens(page.teacher, page.BLOCKS) as tokens, torch.no_grad():
            page.teacher(**dict(batch, mask=mask))
        first.append(tokens[4][:, 0])
    assert torch.equal(*first)


def test_what_was_saved_is_the_student_and_a_teachers_file_loads_too(page):
    student = page.student.state_dict()
    again = page.again.state_dict()
    assert again.keys() == student.keys() and all(torch.equal(again[k], student[k]) for k in student)
    page.again.load_state_dict(page.teacher.state_dict())
    expected = page.compress(page.teacher, 3, page.OMIT)[0].state_dict()
    again = page.again.state_dict()
    assert all(torch.equal(again[k], expected[k]) for k in expected)


def test_distillation_brings_the_features_closer(page):
    """Last, as it trains the page's student on, with the page's two losses of distillation and without dropout."""
    optimizer = torch.optim.AdamW(page.student.eval().parameters(), lr=1e-4)
    features, weights = [], []
    for _ in range(9):
        with page.record_tokens(page.student, page.BLOCKS) as ours:
            page.student(**page.batch)
        with page.record_tokens(page.teacher, page.BLOCKS) as theirs, torch.no_grad():
            page.teacher(**page.batch)
        features.append(page.feature_loss(ours, theirs))
        weights.append(page.perturbation_loss(page.pairs))
        optimizer.zero_grad()
        (features[-1] + weights[-1]).backward()
        optimizer.step()
    assert features[-1] < 0.5 * features[0] and weights[-1] < 0.99 * weights[0]
