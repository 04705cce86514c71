"""Trajectories in LMDB files: writing, reading, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanawm_jax.data.ode_pairs import main, solver_grid
from sanawm_jax.data.ode_store import OdePairs, Shard, find_shards
from sanawm_jax.runtime.errors import InputError

lmdb = pytest.importorskip("lmdb")
STEPS = (1000.0, 500.0, 0.0)
SIZES = {"latents": (3, 4, 2, 3, 5), "camera_conditions": (4, 20), "chunk_plucker": (6, 4, 3, 5)}


def _rows(count: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows: dict[str, Any] = {n: rng.normal(size=(count, *s)) for n, s in SIZES.items()}
    return {**rows, "prompts": [f"prompt ü {seed} {i}" for i in range(count)]}


def _store(folder: Path) -> list[dict[str, Any]]:
    made = []
    for i, counts in enumerate(((2, 1), (2,))):
        shard = Shard(folder / f"shard_{i}", write=True)
        for part, count in enumerate(counts):
            made.append(_rows(count, 10 * i + part))
            shard.append(made[-1])
        shard.close()
    return made


def test_round_trip_in_the_published_layout(tmp_path: Path) -> None:
    made = _store(tmp_path)
    pairs = OdePairs(tmp_path, STEPS)
    assert len(pairs) == 5 and pairs.shape == (3, 4, 2, 3, 5)
    assert pairs.prompts[2:4] == ["prompt ü 1 0", "prompt ü 10 0"]
    found = pairs.rows(np.array([[2, 4]]))
    expected = np.stack([made[1]["latents"][0], made[2]["latents"][1]]).astype(np.float16)
    np.testing.assert_array_equal(found["trajectory"][0], np.moveaxis(expected, 3, -1))
    np.testing.assert_array_equal(
        found["plucker"][0, 1], np.moveaxis(made[2]["chunk_plucker"][1].astype(np.float16), 0, -1)
    )
    pairs.close()
    # the published names and bytes, read without our code
    with lmdb.open(str(tmp_path / "shard_0"), readonly=True, lock=False) as env, env.begin() as t:
        assert t.get(b"latents_shape") == b"3 3 4 2 3 5" and t.get(b"prompts_shape") == b"3"
        assert t.get(b"latents_2_data") == made[1]["latents"][0].astype(np.float16).tobytes()


def test_a_given_first_frame_is_frame_0_of_all_levels(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write=True)
    first = np.full((2, 2, 1, 3, 5), 7.0)
    shard.append({**_rows(2, 0), "first_frame": first})
    shard.close()
    pairs = OdePairs(tmp_path, STEPS)
    assert np.all(pairs.row(1)["trajectory"][:, 0] == 7)
    pairs.close()


def test_damage_and_other_levels_are_named(tmp_path: Path) -> None:
    _store(tmp_path)
    with pytest.raises(InputError, match=r"shard_0 has 3 levels, and denoising_step_list is"):
        OdePairs(tmp_path, (1000, 0))
    shard = Shard(tmp_path / "shard_1", write=True)
    shard.put("timesteps", np.array([[1000.0, 400.0, 0.0]]))
    shard.close()
    with pytest.raises(InputError, match=r"shard_1 has levels \[1000.0, 400.0, 0.0\]"):
        OdePairs(tmp_path, STEPS)
    with lmdb.open(str(tmp_path / "shard_1"), map_size=2**30) as env, env.begin(write=True) as t:
        t.delete(b"timesteps_shape")
        t.put(b"latents_1_data", b"half")
    with pytest.raises(InputError, match=r"shard_1 is damaged: latents of row 1 has 4 bytes"):
        OdePairs(tmp_path, STEPS)
    (tmp_path / "shard_0" / "data.mdb").write_bytes(b"x" * 8192)
    with pytest.raises(InputError, match=r"the shard .*shard_0 cannot be opened"):
        OdePairs(tmp_path, STEPS)
    with pytest.raises(InputError, match=r"holds no data\.mdb"):
        find_shards(tmp_path / "shard_0" / "nothing")


def test_a_solver_stops_at_every_level_of_the_student() -> None:
    grid, places = solver_grid(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), (1000, 600, 500, 0))
    np.testing.assert_allclose(grid, [1, 0.75, 0.6, 0.5, 0.25, 0])
    np.testing.assert_array_equal(places, [0, 2, 3, 5])


def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--teacher", "nowhere", "--latents", "nowhere", "--out", str(tmp_path / "out")]
    for more, line in (
        (["--solver", "midpoint"], "--solver midpoint; use one of euler, heun"),
        (["--denoising_step_list", "1000,500"], "the last entry is 0"),
        ([], "nowhere is neither a folder nor a hub name"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*common, *more])
        assert ended.value.code == 2
        assert line in capsys.readouterr().err
