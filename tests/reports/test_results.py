"""The pictures of a run have the aspect ratio of the images."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from msflow_ext.data import Images, Item
from msflow_ext.evaluation.evaluator import Evaluation
from msflow_ext.reports.heat_maps import read_panels
from msflow_ext.reports.results import write_results

METRICS = {
    "data": {"name": "folder", "category": "plates"},
    "recipe": {},
    "model": {"name": "MSFlow", "backbone": "resnet18"},
    "versions": {},
    "best": {},
    "baseline": None,
    "epochs": 1,
    "seconds": 1.0,
    "losses": [1.0],
}


@pytest.mark.family("pages")
@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_maps_and_report_of_a_run_keep_the_aspect_ratio_of_the_images(tmp_path, fit):
    image = np.full((30, 90, 3), 120, np.uint8)
    marked = np.zeros((30, 90), bool)
    marked[10:20, 60:] = True
    images = Images([Item("scar/0", 1, "scar", image, marked)], 64, fit)
    maps = np.zeros((1, 64, 64), np.float32)
    maps[:, 22:42, 43:] = 3
    found = Evaluation(metrics={}, scores=np.array([1.0]), maps=maps, curves={}, aupimo=None)
    write_results(tmp_path, images, found, METRICS)
    _, heat, outlined = read_panels(tmp_path / "maps" / "scar-0.png")
    assert heat.size == outlined.size == (64, 21)
    hot = np.asarray(heat).astype(int)[..., 0] > 200
    assert hot[8:13, 45:].all()
    assert not hot[:, :40].any()
    page = (tmp_path / "report.html").read_text("utf-8")
    coded = re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    sizes = {Image.open(BytesIO(b64decode(each))).size for each in coded}
    assert sizes == {(64, 21)}
    assert "MSFlow with resnet18" in page
