"""Video files: figures, files that belong together, and bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.__main__ import main as dispatch
from sanawm_jax.media.video import write_mp4


def scene(frames: int = 33, size: int = 32, shade: int = 0) -> np.ndarray:
    """A smooth picture that moves aside and comes back."""
    x = np.linspace(0, 6, size)
    shift = 2 * np.sin(np.linspace(0, np.pi, frames))
    wave = 90 * np.sin(x + shift[:, None])[:, None, :] * np.cos(x)[None, :, None]
    return np.repeat((128 + shade + wave)[..., None], 3, -1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("made", "truth", "poses"):
        (tmp_path / name).mkdir()
    for name, shade in (("good", 0), ("dark", -60)):
        write_mp4(tmp_path / "made" / f"{name}.mp4", scene(shade=shade), 16)
        write_mp4(tmp_path / "truth" / f"{name}.mp4", scene(), 16)
        c2w = actions_to_c2w("a-48,none-8,d-48")[::3][:33]
        np.savez(tmp_path / "poses" / f"{name}.npz", c2w=c2w)
    return tmp_path


def run(folder: Path, *more: str) -> dict:
    dispatch(["videos", "--videos", str(folder / "made"), "--json", str(folder / "o.json"), *more])
    return json.loads((folder / "o.json").read_text())


def test_all_figures(folder: Path) -> None:
    truth, poses = ["--truth", str(folder / "truth")], ["--poses", str(folder / "poses")]
    estimator = ["--estimator", str(folder / "poses"), "--report", str(folder / "page")]
    found = run(folder, *truth, *poses, *estimator)
    assert found["clips"] == 2 and found["failed_estimates"] == 0
    rows = {row["name"]: row["stages"]["video"] for row in found["rows"]}
    assert min(rows["good"]["psnr_by_quarter"]) > 30 > 15 > max(rows["dark"]["psnr_by_quarter"])
    for row in rows.values():
        assert row["windows"] == 1 and row["gradient_ratio_by_window"] == [1.0]
        assert row["pairs"] and row["revisit_psnr"] < 40
        assert row["rot_err_deg"] < 1e-3 and row["poses"] == row["asked"] == 9
    page = (folder / "page" / "index.html").read_text()
    assert page.index("<h3>dark</h3>") < page.index("<h3>good</h3>")  # the worst one first
    alone = run(folder)
    assert "psnr_by_quarter" not in alone and "revisit_psnr" not in alone and alone["sharpness_min"]


def test_a_failed_estimate_is_counted(folder: Path) -> None:
    (folder / "estimates").mkdir()
    c2w = actions_to_c2w("w-32")
    np.save(folder / "estimates" / "good.npy", c2w)
    more = ["--poses", str(folder / "poses"), "--estimator", str(folder / "estimates")]
    found = run(folder, *more)
    assert found["failed_estimates"] == 1
    rows = {row["name"]: row["stages"]["video"] for row in found["rows"]}
    assert rows["dark"]["poses"] == 0 and "dark.npy" in rows["dark"]["error"]
    assert rows["good"]["rot_err_deg"] > 1


def shorten(folder: Path) -> None:
    write_mp4(folder / "made" / "good.mp4", scene(25), 16)


def shrink(folder: Path) -> None:
    write_mp4(folder / "made" / "good.mp4", scene(size=48), 16)


def damage(folder: Path) -> None:
    (folder / "made" / "good.mp4").write_bytes(b"not a video")


def drop_poses(folder: Path) -> None:
    (folder / "poses" / "good.npz").unlink()


def few_poses(folder: Path) -> None:
    np.save(folder / "poses" / "good.npy", np.tile(np.eye(4), (20, 1, 1)))
    drop_poses(folder)


def drop_truth(folder: Path) -> None:
    (folder / "truth" / "good.mp4").unlink()


def drop_videos(folder: Path) -> None:
    for file in (folder / "made").glob("*.mp4"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten, "has 25 frames, its truth"),
        (shrink, "is 48x48, its truth"),
        (damage, "good.mp4"),
        (drop_poses, "good.mp4 has no poses"),
        (few_poses, "33 frames and 20 poses"),
        (drop_truth, "good.mp4 has no truth"),
        (drop_videos, "no .mp4 file in"),
    ],
)
def test_bad_input_is_one_line(
    change, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    with pytest.raises(SystemExit) as caught:
        run(folder, "--truth", str(folder / "truth"), "--poses", str(folder / "poses"))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_an_unknown_estimator(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, words in (
        (["--estimator", "colmap"], "give --poses"),
        (["--estimator", "other", "--poses", str(folder / "poses")], "neither colmap"),
    ):
        with pytest.raises(SystemExit):
            run(folder, *more)
        assert words in capsys.readouterr().err
