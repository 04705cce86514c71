"""Figures of the loss, drawn from metrics files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.curves import main, read_metric, smooth


@pytest.fixture
def metrics(tmp_path):
    rows = [{"step": i + 1, "loss": 2.0 / (i + 1)} for i in range(50)]
    rows.insert(10, {"step": 10, "note": "no loss here"})
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_reads_the_lines_that_have_it(metrics):
    steps, values = read_metric(metrics, "loss")
    np.testing.assert_array_equal(steps, np.arange(1, 51))
    np.testing.assert_allclose(values, 2.0 / np.arange(1, 51))


def test_smooth_is_a_trailing_mean():
    np.testing.assert_allclose(smooth(np.array([4.0, 2.0, 6.0, 1.0]), 2), [4.0, 3.0, 4.0, 3.5])


def test_draws_a_picture(metrics, tmp_path, capsys):
    out = tmp_path / "loss.png"
    assert main([f"VAE={metrics}", str(metrics), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.width > 2 * picture.height
        assert len(set(picture.convert("L").tobytes())) > 10


def test_bad_input_is_one_line(metrics, tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="no metric 'psnr'"):
        read_metric(metrics, "psnr")
