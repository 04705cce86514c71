"""The benchmark of the kernels runs every variant and reports its error."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from benchmarks import kernels, tiles


@pytest.mark.parametrize(
    ("kernel", "parts"),
    [
        ("conv_glu", {"conv_glu"}),
        (
            "ucpe",
            {
                "features and rotation",
                "features to ray space",
                "to ray space",
                "from ray space",
            },
        ),
        pytest.param(
            "gdn",
            {
                "frame maps",
                "normaliser maps",
                "recurrence, one direction",
                "read-out",
                "main branch, one direction",
                "main branch, both directions",
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_variant(kernel, parts, capsys):
    kernels.main(["--tiny", f"--only={kernel}"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines if "error" in line]
    measured = [line for line in lines if "variant" in line]
    for part in parts:
        for name in ("forward", "backward"):
            mine = [a for a in measured if (a["part"], a["pass"]) == (part, name)]
            assert {"xla", "pallas"} <= {line["variant"].split()[0] for line in mine}
            for line in mine:
                assert line["ms"] > 0 and line["gbps"] > 0 and max(line["errors"]) < 1e-5
            fastest = [a for a in lines if "fastest" in a and a["part"] == part]
            assert {line["pass"] for line in fastest} == {"forward", "backward"}


def test_a_wrong_or_broken_variant_is_told_and_never_fastest():
    def broken(x):
        raise ValueError("cannot lower")

    variants = {"xla": lambda x: 2 * x, "wrong": lambda x: 2.1 * x, "broken": broken}
    part = kernels.Part("gdn", "twice", (jnp.ones((1, 2, 3)),), variants, 24.0, 24.0)
    lines = list(kernels.measure(part, 2, 1, ("forward", "backward")))
    found = {(line.get("variant"), line["pass"]): line for line in lines}
    assert found["wrong", "forward"]["errors"] == [pytest.approx(0.05, abs=1e-6)]
    assert not found["wrong", "backward"]["as_accurate_as_xla"]
    assert "cannot lower" in found["broken", "forward"]["error"]
    assert found[None, "forward"]["fastest"] == found[None, "backward"]["fastest"] == "xla"


def test_tiles_alone_need_a_hopper_gpu(capsys):
    with pytest.raises(SystemExit):
        tiles.main([])
    assert "needs a Hopper GPU" in capsys.readouterr().err
