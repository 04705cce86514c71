"""One HTML page per run: figures, curves, and the clips with the worst ones first.

The page needs no network and no other file. Beside it are `report.json`, with the rows of all
clips, and `sheet.png`, the contact sheet.

Axis letters: H W rows and columns of a picture.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sanawm_jax.eval.files import write_json
from sanawm_jax.eval.metrics import finite_mean
from sanawm_jax.eval.runner import Row
from sanawm_jax.runtime.atomic import atomic_write

_SERIES = ("_by_quarter", "_by_window")
_COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#475569")
_MAX_CLIPS = 64  # cards on the page; report.json has all
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1e293b; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption { font-weight: 600; } svg text { font: 11px system-ui, sans-serif; fill: #475569; }
.clip { border-top: 1px solid #cbd5e1; padding: 1rem 0; display: flex; gap: 1rem;
        align-items: flex-start; flex-wrap: wrap; }
.clip img { max-width: 100%; image-rendering: pixelated; } .error { color: #b91c1c; }
"""


def write_report(
    folder: Path,
    title: str,
    table: Mapping[str, Any],
    rows: list[Row],
    strip: Callable[[str], np.ndarray | None],
) -> Path:
    """Writes the page and what is beside it.

    Args:
      folder: created if necessary.
      title: of the page.
      table: figures of the run: numbers, lists by quarter or by window, and further tables, such as
        one per stage.
      rows: of the clips, as `runner.evaluate` returns them.
      strip: name of a clip -> its frames as one picture (H, W, 3) uint8, or None.

    Returns:
      The page, `index.html`.

    Raises:
      InputError: a file cannot be written.
    """
    write_json(folder / "report.json", {"table": table, "rows": rows})
    ordered = worst_first(rows)
    strips = {row["name"]: strip(row["name"]) for row in ordered[:_MAX_CLIPS]}
    shown = [picture for picture in strips.values() if picture is not None]
    if shown:
        with atomic_write(folder / "sheet.png") as partial:
            Image.fromarray(stack(shown)).save(partial)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _figures(table),
        '<h2>Over time</h2><div class="charts">',
        *(_chart(name, lines) for name, lines in _series(table).items()),
        "</div><h2>Clips, the worst ones first</h2>",
        "<p>Rows of a picture: the truth, if there is one, then the videos.</p>",
        *(_card(row, strips[row["name"]]) for row in ordered[:_MAX_CLIPS]),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path = folder / "index.html"
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def worst_first(rows: list[Row]) -> list[Row]:
    """Clips with an error first, then by PSNR or sharpness, then by camera error."""

    def badness(row: Row) -> tuple[float, ...]:
        stages = list(row["stages"].values())
        figures = stages[-1] if stages else {}
        quality = figures.get("psnr_by_quarter") or [figures.get("sharpness_min")]
        known = [value for value in quality if value is not None]
        return (
            0.0 if "error" in row or "error" in figures else 1.0,
            float(np.mean(known)) if known else np.inf,
            -(figures.get("rot_err_deg") or 0.0),
        )

    return sorted(rows, key=badness)


def stack(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) one below the other; narrower ones are filled with black."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0))) for p in pictures])


def _numbers(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and short text of a table, with the names of the tables that it is in."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float | str) or value is None:
            yield prefix + name, value


def _figures(table: Mapping[str, Any]) -> str:
    cells = []
    for name, value in _numbers(table):
        shown = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
        cells.append(
            f"<tr><td>{html.escape(name.replace('_', ' '))}</td>"
            f'<td class="number">{html.escape(shown)}</td></tr>'
        )
    return f"<table>{''.join(cells)}</table>"


def _series(table: Mapping[str, Any], stage: str = "") -> dict[str, dict[str, list]]:
    """Curves by name, each with a line per stage."""
    found: dict[str, dict[str, list]] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            for inner, lines in _series(value, name).items():
                found.setdefault(inner, {}).update(lines)
        elif isinstance(value, list) and name.endswith(_SERIES):
            found.setdefault(name, {})[stage] = value
    return found


def _points(
    values: Iterable[Sequence[float]], x_range: tuple, y_range: tuple, size: tuple[int, int]
) -> str:
    """Coordinates of a polyline in a picture of a size with a margin of 30."""
    (x0, x1), (y0, y1), (width, height) = x_range, y_range, size
    return " ".join(
        f"{30 + (x - x0) / max(x1 - x0, 1e-9) * (width - 40):.1f},"
        f"{height - 20 - (y - y0) / max(y1 - y0, 1e-9) * (height - 40):.1f}"
        for x, y in values
    )


def _chart(name: str, lines: Mapping[str, list]) -> str:
    size = (300, 170)
    known = [v for values in lines.values() for v in values if v is not None]
    if not known:
        return ""
    low, high = min([*known, 0.0]), max(known) or 1.0
    most = max(len(values) for values in lines.values())
    floor, right = size[1] - 20, size[0] - 10
    parts = [f'<line x1="30" y1="{floor}" x2="{right}" y2="{floor}" stroke="#94a3b8"/>']
    for (stage, values), color in zip(lines.items(), _COLORS * len(lines), strict=False):
        pairs = [(i, v) for i, v in enumerate(values) if v is not None]
        points = _points(pairs, (0, max(most - 1, 1)), (low, high), size)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for point in points.split():
            x, y = point.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        if stage:
            row = 12 + 13 * list(lines).index(stage)
            parts.append(
                f'<text x="200" y="{row}" style="fill:{color}">{html.escape(stage)}</text>'
            )
    parts.append(
        f'<text x="0" y="24">{high:.3g}</text><text x="0" y="{size[1] - 18}">{low:.3g}</text>'
    )
    label = html.escape(name.replace("_", " "))
    return (
        f'<figure><figcaption>{label}</figcaption><svg width="{size[0]}" height="{size[1]}" '
        f'role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _paths(path: Mapping[str, list]) -> str:
    """Paths from above: to the right in x, ahead upwards, both at one scale."""
    every = np.array([point for line in path.values() for point in line])
    middle = (every.min(0) + every.max(0)) / 2
    reach = max(float((every.max(0) - every.min(0)).max()) / 2, 1e-6)
    x_range, y_range = ((m - reach, m + reach) for m in middle)
    parts = []
    for (name, line), color in zip(path.items(), _COLORS, strict=False):
        points = _points(line, x_range, y_range, (190, 180))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        row = 10 + 12 * (len(parts) - 1)
        parts.append(f'<text x="2" y="{row}" style="fill:{color}">{html.escape(name)}</text>')
    return f'<svg width="190" height="180" role="img" aria-label="paths">{"".join(parts)}</svg>'


def _card(row: Row, picture: np.ndarray | None) -> str:
    """One clip: its figures, its frames, and its paths."""
    parts = []
    if picture is not None:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(f'<img alt="frames" src="data:image/png;base64,{data}">')
    error = f'<p class="error">{html.escape(str(row["error"]))}</p>' if "error" in row else ""
    for stage, figures in row["stages"].items():
        simple = {
            name: float(finite_mean(np.array(value, float))) if isinstance(value, list) else value
            for name, value in figures.items()
            if name.endswith(_SERIES) or isinstance(value, int | float | str)
        }
        parts.append(f"<div><b>{html.escape(stage)}</b>{_figures(simple)}</div>")
        if figures.get("path"):
            parts.append(_paths(figures["path"]))
    name = html.escape(row["name"])
    return f'<h3>{name}</h3>{error}<div class="clip">{"".join(parts)}</div>'
