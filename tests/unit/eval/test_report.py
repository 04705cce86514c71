"""The page of a run: complete, self-contained, worst clips first."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from sanawm_jax.eval.report import worst_first, write_report
from sanawm_jax.eval.runner import Row

TABLE = {
    "clips": 3,
    "stage1": {"psnr": 21.23456, "psnr_by_quarter": [24.0, 22.0, 20.0, None]},
    "refined": {"psnr": 22.0, "psnr_by_quarter": [25.0, 23.0, 21.0, 20.0]},
}


def row(name: str, psnr: float, **more: object) -> Row:
    path = {"commanded": [[0, 0], [0, 1]], "estimated": [[0, 0], [0.1, 0.9]]}
    figures = {"psnr_by_quarter": [psnr, psnr - 2], "rot_err_deg": 3.0, "path": path}
    return {"name": name, "stages": {"stage1": figures}, **more}


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.points: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "polyline":
            self.points.append(str(given["points"]))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = [row("fair", 20.0), row("b<a>d", 10.0), row("good", 30.0)]
    strips = {r["name"]: rng.integers(0, 255, (8, 28, 3), dtype=np.uint8) for r in rows[:2]}
    page = write_report(tmp_path / "out", "Run & test", TABLE, rows, strips.get)
    text = page.read_text()
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    assert len(parsed.loaded) == 2  # the clip without a picture loads none
    assert all(source.startswith("data:image/png;base64,") for source in parsed.loaded)
    assert not re.search(r"https?://|<script|@import", text)
    assert "Run &amp; test" in text and "21.23" in text
    # one line per stage, and two paths per clip
    assert len(parsed.points) == 2 + 2 * 3
    assert [len(points.split()) for points in parsed.points[:2]] == [3, 4]
    heads = re.findall("<h3>(.*?)</h3>", text)
    assert heads == ["b&lt;a&gt;d", "fair", "good"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == rows
    assert Image.open(tmp_path / "out" / "sheet.png").size == (28, 16)


def test_paths_keep_their_proportions(tmp_path: Path) -> None:
    """The commanded path goes straight up; the estimate ends to its right and below."""
    page = write_report(tmp_path, "x", {}, [row("a", 1.0)], lambda name: None)
    parsed = Page()
    parsed.feed(page.read_text())
    commanded, estimated = (
        np.array([p.split(",") for p in points.split()], float) for points in parsed.points
    )
    up, aside = commanded[1] - commanded[0], estimated[1] - commanded[1]
    assert up[0] == 0 and up[1] < -50
    assert 0 < aside[0] < 30 and 0 < aside[1] < 30
    assert not (tmp_path / "sheet.png").exists()


def test_errors_come_before_bad_quality() -> None:
    rows = [row("good", 30.0), row("bad", 5.0), row("broken", 40.0, error="unreadable")]
    rows[0]["stages"]["stage1"]["psnr_by_quarter"] = [None, None]
    rows.append({"name": "nothing", "stages": {}, "error": "no video"})
    names = [r["name"] for r in worst_first(rows)]
    assert set(names[:2]) == {"broken", "nothing"} and names[2:] == ["bad", "good"]
