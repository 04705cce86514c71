"""The benchmark on a set of its layout, made from the small world: make, measure, go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.__main__ import main as dispatch
from sanawm_jax.eval.bench import SPLITS, read_split
from sanawm_jax.media.video_reader import video_facts
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.clip import make_clips
from tests.e2e.test_train_refiner import make_stage1

SCENES = ("indoor_001", "indoor_002", "game_style_001")


def make_benchmark(root: Path) -> None:
    """Both splits, each with three scenes of 17 frames of 32x32."""
    c2w = actions_to_c2w("a-8,d-8")
    for seed, folder in enumerate(SPLITS.values()):
        export = root / folder / "sanawm_export_v2"
        export.mkdir(parents=True)
        manifest, trajectories = [], []
        clips = make_clips(range(3 * seed, 3 * seed + 3), 9, 32, 32)
        for name, clip in zip(SCENES, clips, strict=True):
            Image.fromarray(clip["video"][0]).save(export / f"{name}.png")
            fx, fy, cx, cy = clip["intrinsics"]
            camera = np.array(((fx, 0, cx), (0, fy, cy), (0, 0, 1)))
            intrinsics = np.tile(camera, (17, 1, 1))
            np.savez(export / f"{name}.npz", c2w=c2w, intrinsics=intrinsics, fps=16, num_frames=17)
            place = f"{folder}/sanawm_export_v2/{name}"
            manifest.append(
                {
                    "id": name,
                    "prompt": clip["caption"],
                    "image_path": f"{place}.png",
                    "camera_path": f"{place}.npz",
                    "scene_type": name.rpartition("_")[0],
                }
            )
            pair = {"frame_a": 0, "frame_b": 16, "distance_m": 0.1, "angle_diff_deg": 2.0}
            pairs = [{**pair, "quality_score": 0.5, "frame_b": b} for b in range(8, 17)]
            trajectories.append(
                {"scene_id": name, "evaluation_pairs": [*pairs, {**pair, "quality_score": 0.1}]}
            )
        (export / "run_manifest.jsonl").write_text("\n".join(map(json.dumps, manifest)) + "\n")
        (root / folder / "scene_trajectories_v2.json").write_text(
            json.dumps({"scenes": trajectories})
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_benchmark(folder / "data")
    make_stage1(folder / "stage1")
    return folder


def command(data: Path, *more: str) -> list[str]:
    return [
        *(
            "bench",
            "--data",
            str(data / "data"),
            "--out",
            str(data / "results"),
            "--method",
            "ours",
        ),
        *("--weights", str(data / "stage1"), "--num_frames", "17", "--height", "32"),
        *("--width", "32", "--steps", "1", "--text_length", "48", "--dtype", "float32", *more),
    ]


def test_make_measure_and_go_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(command(data, "--part", "1/2"))  # one process of two makes one scene of each split
    method = data / "results" / "ours"
    made = sorted(str(file.relative_to(method)) for file in method.rglob("*.mp4"))
    assert made == [f"{split}/indoor_002_generated.mp4" for split in ("hard_60s", "simple_60s")]
    before = {file: (method / file).stat().st_mtime_ns for file in made}
    assert not (method / "eval").exists()  # the other process measures
    dispatch(command(data, "--estimator", str(data / "none"), "--only", "make"))
    assert len(list(method.rglob("*_generated.mp4"))) == 6
    assert {file: (method / file).stat().st_mtime_ns for file in made} == before
    assert len(video_facts(method / made[0]).times) == 17
    info = json.loads((method / "method_info.json").read_text())
    assert info["flow_shift"] == 8.0 and info["cfg_scale"] == 5.0 and info["seed"] == 42
    assert info["refiner"] is None and info["resolution"] == [32, 32]

    # another program's poses, of the manifest's own paths but one
    estimates = data / "estimates"
    estimates.mkdir()
    for name in SCENES[:2]:
        np.save(estimates / f"{name}.npy", actions_to_c2w("a-8,d-8"))
    dispatch(command(data, "--only", "measure", "--estimator", str(estimates)))
    table = json.loads((method / "eval" / "summary.json").read_text())["simple_60s"]
    assert table["clips"] == 3 and table["failed_estimates"] == 1
    assert table["rot_err_deg"] < 1e-3 and table["revisit_psnr"] > 0
    poses = json.loads((method / "simple_60s" / "eval_poses.json").read_text())
    assert poses["indoor_001"]["RotErr_unit"] == "deg" and poses["indoor_001"]["n_frames"] == 5
    assert "error" in poses["game_style_001"]
    revisits = json.loads((method / "eval" / "hard_60s" / "revisit_consistency.json").read_text())
    assert revisits["summary"]["n_total_pairs"] == 15  # the five best of each scene
    assert revisits["per_scene"]["indoor_001"]["pairs"][0]["frame_b"] == 16
    categories = revisits["summary"]["per_category"]
    assert {name: row["n_scenes"] for name, row in categories.items()} == {
        "game_style": 1,
        "indoor": 2,
    }
    assert "| simple_60s | 3 |" in (method / "eval" / "summary.md").read_text()
    assert (method / "eval" / "hard_60s" / "index.html").is_file()
    capsys.readouterr()

    with pytest.raises(SystemExit):  # the folder holds videos of other settings
        dispatch(command(data, "--seed", "7"))
    assert "has other settings" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--splits", "easy"], "unknown split 'easy'"),
        (["--scenes", "indoor_001,moon"], "unknown scenes in --scenes: moon"),
        (["--part", "2/2"], "--part=2/2"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--method", "new", "--only", "measure"], "method_info.json is missing"),
    ],
)
def test_bad_input(
    data: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch(command(data, *more))
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_manifest(tmp_path: Path) -> None:
    make_benchmark(tmp_path)
    manifest = tmp_path / SPLITS["simple_60s"] / "sanawm_export_v2" / "run_manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], '{"id": "x"}']))
    with pytest.raises(InputError, match="line 2: not a scene"):
        read_split(tmp_path, "simple_60s")
