"""The key scaling: it bounds the transition of a frame; and a few steps of the benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import key_scaling
from kernels_pallas.gdn import frame_transitions


@pytest.mark.parametrize(
    ("name", "bounded"), [(name, name == "1/sqrt(D*S)") for name in key_scaling.KEY_FACTORS]
)
def test_only_the_scale_by_tokens_bounds_a_frame(name: str, bounded: bool) -> None:
    size, tokens = 16, 64
    keys = jax.random.normal(jax.random.key(0), (1, 1, tokens, 1, size))
    keys = jax.nn.relu(keys / jnp.sqrt(jnp.mean(keys**2, -1, keepdims=True)))  # as the model's are
    scaled = keys * key_scaling.KEY_FACTORS[name](size, tokens)
    beta, decay = jnp.full((1, 1, tokens, 1), 0.5), jnp.ones((1, 1, 1))
    w = frame_transitions(scaled, scaled, beta, decay).w[0, 0, 0]
    norm = np.linalg.norm(np.asarray(w), ord=2)
    assert norm <= 1 + 1e-5 if bounded else norm > 2


@pytest.mark.slow
def test_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("1/sqrt(D*S)", "none")
    out = tmp_path / "curves.png"
    flags = ("--tiny", "--steps=3", f"--out={out}", f"--workdir={tmp_path}")
    runs = key_scaling.main([*flags, "--key_scales", *names])
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert tuple(runs) == names
    scaled, unscaled = runs.values()
    assert [row["step"] for row in scaled] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in scaled)
    # the same weights, clips and noise
    assert unscaled[0]["loss"] == pytest.approx(scaled[0]["loss"], rel=1e-4)
    assert 0 < 10 * scaled[0]["largest_state"] < unscaled[0]["largest_state"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["key_scale"] for line in printed} == set(names)
