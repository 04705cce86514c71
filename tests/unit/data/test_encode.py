"""Which clips a run of `data.encode` encodes again, with an autoencoder that only takes means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.data import encode
from sanawm_jax.data.zip_members import CameraFile
from sanawm_jax.runtime.lock import only_run_in
from tests.own_files import N, film, npz


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two films with cameras, and an autoencoder that counts what it is given."""

    def mean(video: np.ndarray) -> np.ndarray:
        return np.full((2, 1, 1, 4), video.mean(), np.float16)

    monkeypatch.setattr(encode, "make_encoder", lambda *options: (mean, 8, 32))
    for key in "ab":
        film(tmp_path / "videos" / f"{key}.mp4")
        npz(tmp_path / "poses" / f"{key}.npz")
    return tmp_path


def run(own: Path, capsys: pytest.CaptureFixture, **over: object) -> str:
    """Returns the last line of a run; for a run that fails, the line of its error."""
    given = {"weights": "w", "num_frames": N, "height": 32, "width": 32, "dtype": "float32", **over}
    given = {"videos": own / "videos", "poses": own / "poses", "out": own / "out", **given}
    try:
        encode.main([f"--{name}={value}" for name, value in given.items()])
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    return capsys.readouterr().out.splitlines()[-1]


def focal_lengths(own: Path) -> list[float]:
    cameras = CameraFile(own / "out/raw/clips_00000_camera.npz")
    return [float(cameras.of(key)[1][0, 0]) for key in "ab"]


def break_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second film cannot be read, once."""
    load, read = encode.load_clip, []

    def load_clip(video, *size):
        read.append(video.key)
        if len(read) == 2:
            raise encode.InputError(f"{video.path} ends after 5 frames")
        return load(video, *size)

    monkeypatch.setattr(encode, "load_clip", load_clip)


@pytest.mark.parametrize("changed", ["nothing", "intrinsics", "film", "poses"])
def test_parts_of_another_source_are_made_again(
    changed: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    break_once(monkeypatch)
    assert "ends after 5 frames" in run(own, capsys, intrinsics="40,40,24,16")
    part = own / "out/.encoded/a.npz"
    before = part.stat().st_mtime_ns
    if changed == "film":
        film(own / "videos" / "a.mp4", width=64, height=48)
    if changed == "poses":
        npz(own / "poses" / "a.npz", N, intrinsics=[44.0, 44, 24, 16])
    intrinsics = "30,30,24,16" if changed == "intrinsics" else "40,40,24,16"
    stamps = []
    monkeypatch.setattr(encode, "write_zip_latents", _then(encode.write_zip_latents, part, stamps))
    assert run(own, capsys, intrinsics=intrinsics) == str(own / "out")
    assert (stamps == [before]) == (changed == "nothing")
    expected = {"intrinsics": [30, 30], "poses": [44, 40], "film": [40 * 43 / 64, 40]}
    np.testing.assert_allclose(focal_lengths(own), expected.get(changed, [40, 40]), rtol=1e-5)
    assert sorted(f.name for f in (own / "out/reports").iterdir()) == [
        *("a.json", "a.png", "b.json", "b.png")
    ]


def _then(write, part: Path, stamps: list[int]):
    def wrapped(*given):
        stamps.append(part.stat().st_mtime_ns)
        return write(*given)

    return wrapped


def test_finished_clips_of_another_source_are_one_line(own: Path, capsys) -> None:
    assert run(own, capsys) == str(own / "out")
    assert run(own, capsys) == str(own / "out")
    line = run(own, capsys, intrinsics="40,40,24,16")
    assert f"{own}/out holds clip a with other intrinsics than" in line
    assert "with another --dtype than" in run(own, capsys, dtype="bfloat16")
    (own / "videos" / "b.txt").write_text("a red room")
    assert "holds clip b with another caption than" in run(own, capsys)
    (own / "videos" / "b.txt").unlink()
    film(own / "videos" / "a.mp4", 9, width=64)
    assert "holds clip a with another film than" in run(own, capsys)


def test_reports_alone(own: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--weights=w", f"--num_frames={N}", "--height=32", "--width=32", "--report_only"]
    places = [f"--{n}={own / n}" for n in ("videos", "poses", "out")]
    encode.main([*given, *places])
    assert capsys.readouterr().out.splitlines()[-1] == str(own / "out/reports")
    assert sorted(f.name for f in (own / "out").iterdir()) == [".lock", "reports"]


def test_one_encoder_in_a_folder(own: Path, capsys: pytest.CaptureFixture) -> None:
    (own / "out").mkdir()
    with only_run_in(own / "out"):
        assert "another run is working in" in run(own, capsys)
    assert run(own, capsys) == str(own / "out")
