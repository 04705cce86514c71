"""A step of self-forcing on a mesh equals that on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import distill
from sanawm_jax.core.params import leaves
from sanawm_jax.core.sharding import axis_size, logical_spec, make_mesh, undivided
from sanawm_jax.training.engine.loop import train


def one_step(workdir: Path, **mesh: int) -> tuple[Any, dict[str, float]]:
    config = distill.get_config("smoke")
    config.dit.update(num_layers=2, softmax_every_n=2)
    config.synthetic.update(clips=8, latent_frames=7, height=2, width=2)
    config.update(batch_size=4, steps=1, save_every=1, curves=False)
    config.mesh.update(mesh)
    state = train(config, workdir)
    row = json.loads((workdir / "metrics.jsonl").read_text())
    return state, {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path: Path) -> None:
    """Context ranks divide the clips that the scores see, and none of a chunk."""
    whole, expected = one_step(tmp_path / "one")
    parted, found = one_step(tmp_path / "mesh", data=2, fsdp=2, context=2)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, learner in whole.learners.items():
        other = parted.learners[name].moments
        # the moments are squared gradients, which a step of Adam would hide
        for (path, a), (_, b) in zip(_second(learner.moments), _second(other), strict=True):
            assert np.linalg.norm(a - b) <= 1e-3 * max(float(np.linalg.norm(a)), 1e-12), path


def _second(moments: Any) -> list[tuple[str, np.ndarray]]:
    import optax

    tree: Any = optax.tree_utils.tree_get(moments, "nu")
    return [(path, np.asarray(leaf)) for path, leaf in leaves(tree)]


def test_hidden_axes() -> None:
    import jax

    with jax.set_mesh(make_mesh(data=2, context=4)):
        assert axis_size("context") == 4 and logical_spec("B F P")[1] == "context"
        with undivided("context"):
            assert axis_size("context") == 1 and axis_size("data") == 2
            assert logical_spec("B F P")[1] is None
        assert axis_size("context") == 4
