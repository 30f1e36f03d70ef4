"""Variants change what they name, a row is computed once, and the notes have all rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from msflow_ext import MSFlow

Load = Callable[[str], ModuleType]


def test_ablations_remove_the_part_that_they_name(load: Load) -> None:
    ablations = load("campaigns.ablations")
    options = {"image_size": 64, "pretrained": False, "blocks": (1, 1), "cond_channels": 8}
    model = MSFlow("test_resnet", **options, seed=0)
    x = [
        torch.randn(2, c, 8 // k, 8 // k) for k, c in zip((1, 2), model.head.channels, strict=True)
    ]
    before = model.head(x)
    ablations.with_learnable_base(model)
    same = model.head(x)
    assert all(torch.equal(a, b) for a, b in zip(same.z, before.z, strict=True))
    model.head.base_scale[0].data += 0.5
    shift = 0.5 * x[0][0].numel()
    assert torch.allclose(model.head(x).log_det, before.log_det + shift)

    model = MSFlow("test_resnet", **options, seed=0)
    ablations.without_condition(model)
    ablations.without_fusion(model)
    assert not any(flow.steps[0].subnet.conv_cond.weight.any() for flow in model.head.flows)
    out = model.head(x)
    apart = [flow(t)[0] for t, flow in zip(x, model.head.flows, strict=True)]
    for z, y in zip(out.z, apart, strict=True):
        torch.testing.assert_close(z.square().sum(1), y.square().sum(1))
    other = model.head([x[0], torch.zeros_like(x[1])])
    assert torch.equal(other.z[0], out.z[0])


def test_the_variant_with_reflection_equals_the_padding_mode_reflect(load: Load) -> None:
    options = {"image_size": 64, "blocks": (1, 1), "cond_channels": 8}
    by_hand = MSFlow("test_resnet", pretrained=False, **options)
    built_in = MSFlow("test_resnet", pretrained=False, padding_mode="reflect", **options)
    built_in.backbone.load_state_dict(by_hand.backbone.state_dict())
    images = torch.rand(1, 3, 64, 64)
    zeros = by_hand.features(images)
    load("campaigns.ablations").reflect(by_hand)
    expected = built_in.features(images)
    for got, want, zero in zip(by_hand.features(images), expected, zeros, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(zero, want)


def test_existing_rows_are_not_computed_again_and_seeds_are_averaged(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablate, file, page = load("campaigns.ablate"), tmp_path / "rows.jsonl", tmp_path / "page.md"
    page.write_text("<!-- ablations:begin -->\n<!-- ablations:end -->\n")
    monkeypatch.setattr(ablate, "PAGE", page)
    monkeypatch.setattr(
        ablate, "run", lambda *_: {"scores": {"nll 3%": [0.9 + 0.01 * next(count)]}}
    )
    count = iter(range(9))
    command = ["MSFlow paper", "--data", "mono", "--file", str(file), "--seeds"]
    assert ablate.main([*command, "0"]) == ablate.main([*command, "0", "1", "2"]) == 0
    assert next(count) == 3
    assert ablate.main(["--file", str(file), "--table"]) == 0
    lines = page.read_text().splitlines()
    assert lines[2:4] == ["### Image AUROC, mono", ""]
    assert lines[4].startswith("| variant | paper's score | NLL, top 1% | NLL, top 3% |")
    assert lines[6].startswith("| MSFlow paper | - | - | 91.0 +- 1.0 (3) | - |")
    assert sum(line.startswith("| MSFlow paper") for line in lines) == 1


def test_the_tables_of_the_notes_have_every_row_of_the_results(load: Load) -> None:
    ablate = load("campaigns.ablate")
    if not ablate.FILE.exists():
        pytest.skip("a source distribution has no results")
    written = ablate.PAGE.read_text().partition("<!-- ablations:begin -->\n")[2]
    expected = "\n".join(ablate.tables(ablate.rows(ablate.FILE)))
    assert written.startswith(f"{expected}\n<!-- ablations:end -->"), (
        "run python -m benchmarks.campaigns.ablate --table"
    )
