"""A picture of a run's loss from its `metrics.jsonl`; needs matplotlib, the extra `plots`.

python -m sanawm_jax.training.curves --out loss.png "VAE=vae/metrics.jsonl" dit/metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError


def read_metric(file: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, both (n,) float64, of one metric; lines without it are left out.

    Raises:
      InputError: no such file, a line that is not JSON, or the metric on no line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file} ({error})") from None
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not pairs:
        raise InputError(f"{file} has no metric {name!r}")
    steps, values = np.array(pairs, np.float64).T
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values up to each, fewer at the start: (n,) -> (n,)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / (end - start)


@contextmanager
def panels(out: str | Path, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Axes side by side, (columns,), which are written to a PNG at the end.

    Args:
      size: of the whole picture, width and height in inches.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False)
    yield axes[0]
    figure.tight_layout()
    with atomic_write(out) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)


def draw(runs: dict[str, str | Path], out: str | Path, *, metric: str = "loss") -> Path:
    """Draws one panel a run, its title -> its metrics file, to a PNG."""
    with panels(out, len(runs), (5 * len(runs), 3.2)) as axes:
        for axis, (title, file) in zip(axes, runs.items(), strict=True):
            steps, values = read_metric(file, metric)
            axis.plot(steps, values, color="#b8c4d8", linewidth=0.5)
            axis.plot(steps, smooth(values, max(1, len(values) // 100)), color="#1f4e9c")
            low, high = np.percentile(values, [0.1, 99.0])
            axis.set(title=title, xlabel="step", ylabel=metric, yscale="log")
            if low < high:
                axis.set_ylim(low, high)
            axis.grid(alpha=0.3, which="both")
    return Path(out)


def main(argv: list[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A picture of a run's loss.")
    parser.add_argument("runs", nargs="+", help="metrics.jsonl, or TITLE=metrics.jsonl")
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--out", default="loss.png")
    options = parser.parse_args(argv)
    pairs = [run.rpartition("=") for run in options.runs]
    try:
        titles = {title or Path(file).parent.name: file for title, _, file in pairs}
        print(draw(titles, options.out, metric=options.metric))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
