"""Pose files: each layout gives the same path, and each error names its file and frame."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sanawm_jax.camera.pose_files import read_poses
from sanawm_jax.camera.poses import relative_to_first
from sanawm_jax.runtime.errors import InputError
from tests.zip_set import random_path

F = 12


@pytest.fixture
def c2w(rng: np.random.Generator) -> np.ndarray:
    return random_path(rng, F).astype(np.float64)


def write_tum(file: Path, c2w: np.ndarray) -> None:
    quaternions = Rotation.from_matrix(c2w[:, :3, :3]).as_quat()
    rows = np.concatenate([np.arange(len(c2w))[:, None] / 16, c2w[:, :3, 3], quaternions], 1)
    np.savetxt(file, rows, header="timestamp tx ty tz qx qy qz qw", fmt="%.9f")


def write_kitti(file: Path, c2w: np.ndarray) -> None:
    np.savetxt(file, c2w[:, :3].reshape(len(c2w), 12))


def write_nerfstudio(file: Path, c2w: np.ndarray, **over: object) -> None:
    """Writes frames in a shuffled order, with names whose text order is not their order."""
    opengl = c2w * [1, -1, -1, 1]  # y up, looking along -z
    frames = [
        {"file_path": f"images/frame_{n + 1}.png", "transform_matrix": opengl[n].tolist()}
        for n in np.random.default_rng(0).permutation(len(c2w))
    ]
    common = {"fl_x": 90.0, "fl_y": 80.0, "cx": 63.5, "cy": 47.5, "w": 128, "h": 96}
    file.write_text(json.dumps({**common, "frames": frames, **over}))


def write_colmap(
    folder: Path, c2w: np.ndarray, camera: str = "1 PINHOLE 128 96 90 80 64 48"
) -> None:
    """Writes a text model that every version of COLMAP reads, with images in a shuffled order."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(f"# cameras\n{camera}\n")
    lines = []
    w2c = np.linalg.inv(c2w)
    for image, n in enumerate(np.random.default_rng(0).permutation(len(c2w)), 1):
        x, y, z, w = Rotation.from_matrix(w2c[n, :3, :3]).as_quat()
        numbers = " ".join(f"{v:.12f}" for v in (w, x, y, z, *w2c[n, :3, 3]))
        lines.append(f"{image} {numbers} 1 frame_{n + 1}.png\n\n")
    (folder / "images.txt").write_text("".join(lines))
    (folder / "points3D.txt").write_text("")


@pytest.mark.parametrize("pose_format", ["auto", "named"])
@pytest.mark.parametrize("layout", ["npy", "npz", "tum", "kitti", "nerfstudio", "colmap"])
def test_all_layouts_give_the_path(
    layout: str, pose_format: str, c2w: np.ndarray, tmp_path: Path
) -> None:
    if layout == "colmap":
        pytest.importorskip("pycolmap")
    path = (
        tmp_path
        / {
            "npy": "x.npy",
            "npz": "x.npz",
            "tum": "x.txt",
            "kitti": "y.txt",
            "nerfstudio": "transforms.json",
            "colmap": "scene",
        }[layout]
    )
    if layout == "npy":
        np.save(path, c2w)
    elif layout == "npz":
        intrinsics = np.array([90.0, 80, 64, 48])
        np.savez(path, c2w=c2w, intrinsics=intrinsics, width=128, height=96)
    elif layout == "colmap":
        write_colmap(path / "sparse" / "0", c2w)
    else:
        {"tum": write_tum, "kitti": write_kitti, "nerfstudio": write_nerfstudio}[layout](path, c2w)
    name = {"npy": "npz"}.get(layout, layout)
    track = read_poses(path, "auto" if pose_format == "auto" else name)
    assert track.c2w.shape == (F, 4, 4) and track.c2w.dtype == np.float32
    np.testing.assert_allclose(track.c2w, c2w, atol=1e-5)
    expected = {
        "npz": [90, 80, 64, 48],
        "nerfstudio": [90, 80, 63.5, 47.5],
        "colmap": [90, 80, 64, 48],
    }.get(layout)
    if expected is None:
        assert track.intrinsics is None and track.intrinsics_of(64, 48) is None
        return
    assert track.intrinsics is not None and track.intrinsics.shape == (F, 4)
    np.testing.assert_allclose(track.intrinsics[3], expected)
    in_video = track.intrinsics_of(256, 48)
    assert in_video is not None
    np.testing.assert_allclose(in_video[3], np.array(expected) * [2, 0.5, 2, 0.5])


def test_nerfstudio_axes(tmp_path: Path) -> None:
    """A camera that moves along its own -z in OpenGL goes forward in OpenCV."""
    opengl = np.tile(np.eye(4), (3, 1, 1))
    opengl[:, 2, 3] = [0, -1, -2]
    frames = [{"file_path": f"{n}", "transform_matrix": m.tolist()} for n, m in enumerate(opengl)]
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": frames}))
    track = read_poses(tmp_path)
    assert track.intrinsics is None
    np.testing.assert_allclose(relative_to_first(track.c2w)[:, 2, 3], [0, 1, 2])


def test_nerfstudio_intrinsics(c2w: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "transforms.json"
    matrices = [m.tolist() for m in c2w[:2]]
    own = [{"file_path": f"{n}", "transform_matrix": m} for n, m in enumerate(matrices)]
    for n, frame in enumerate(own):
        frame["fl_x"] = 50.0 + n
    file.write_text(json.dumps({"w": 100, "h": 60, "frames": own}))
    track = read_poses(file)
    assert track.intrinsics is not None
    np.testing.assert_allclose(track.intrinsics, [[50, 50, 50, 30], [51, 51, 50, 30]])
    for frame in own:
        del frame["fl_x"]
    file.write_text(json.dumps({"w": 100, "h": 60, "camera_angle_x": np.pi / 2, "frames": own}))
    track = read_poses(file)
    assert track.intrinsics is not None
    np.testing.assert_allclose(track.intrinsics[0], [50, 50, 50, 30])
    with pytest.warns(UserWarning, match="lens distortion"):
        write_nerfstudio(file, c2w, k1=0.1)
        read_poses(file)
    for over, message in (
        ({"camera_model": "OPENCV_FISHEYE"}, "camera_model OPENCV_FISHEYE"),
        ({"fl_x": "wide"}, "no numbers"),
        ({"frames": []}, "no frames"),
        ({"frames": [{"file_path": "a"}]}, "no transforms.json: KeyError"),
        ({"frames": [{"file_path": "a", "transform_matrix": [[1]]}]}, r"is \(1, 1\)"),
    ):
        write_nerfstudio(file, c2w, **over)
        with pytest.raises(InputError, match=message):
            read_poses(file)


def test_colmap_cameras(c2w: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("pycolmap")
    write_colmap(tmp_path / "a", c2w, "1 SIMPLE_RADIAL 128 96 90 64 48 0.1")
    with pytest.warns(UserWarning, match="lens distortion"):
        track = read_poses(tmp_path / "a")
    assert track.intrinsics is not None
    np.testing.assert_allclose(track.intrinsics[0], [90, 90, 64, 48])
    write_colmap(tmp_path / "b", c2w, "1 OPENCV_FISHEYE 128 96 90 90 64 48 0 0 0 0")
    with pytest.raises(InputError, match="model OPENCV_FISHEYE; undistort"):
        read_poses(tmp_path / "b")
    write_colmap(tmp_path / "c", c2w)
    (tmp_path / "c" / "cameras.txt").write_text("1 NONSENSE 1 2 3\n")
    with pytest.raises(InputError, match="pycolmap cannot read"):
        read_poses(tmp_path / "c")


def test_colmap_without_pycolmap(c2w: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    write_colmap(tmp_path / "a", c2w)
    with pytest.raises(InputError, match=r"pip install 'sanawm-jax\[poses\]'"):
        read_poses(tmp_path / "a")


def test_bad_files(c2w: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no pose file"):
        read_poses(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="no pose file that is known"):
        read_poses(tmp_path)
    file = tmp_path / "x.txt"
    for text, message in (
        ("1 2 3\n", "3 numbers a row; known are .*TUM"),
        ("1 2\n1 2 3\n", "not a table of numbers"),
        ("# nothing\n", "holds no poses"),
        ("0 0 0 0 0 0 0 2\n", "quaternion of row 1 has length 2"),
        ("1 0 0 0 0 0 0 1\n1 0 0 0 0 0 0 1\n", "time of row 2 is not after"),
        ("1 0 0 0 0 0 0 1\n2 0 0 0 0 nan 0 1\n", "row 1 holds NaN"),
        ("1 0 0 0 0 1 0 0 0 0 2 0\n", "frame 0 is not a rigid"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            read_poses(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="expected 8, timestamp"):
        read_poses(file, "tum")
    with pytest.raises(InputError, match="pose_format='pose'; use one of auto, npz, tum"):
        read_poses(file, "pose")
    write_kitti(file, c2w)
    file.write_text(file.read_text().replace(" ", ","))  # commas serve as well
    np.testing.assert_allclose(read_poses(file).c2w, c2w, atol=1e-5)
    np.savez(tmp_path / "x.npz", poses=c2w)
    with pytest.raises(InputError, match="no array c2w; it has poses"):
        read_poses(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"not a plain \.npz"):
        read_poses(tmp_path / "x.npz")


def test_more_layouts(c2w: np.ndarray, tmp_path: Path) -> None:
    w2c = np.linalg.inv(c2w)
    order = np.random.default_rng(1).permutation(F)
    np.savez(tmp_path / "vipe.npz", data=c2w[order], inds=order + 7)
    np.save(tmp_path / "34.npy", c2w[:, :3])
    np.save(tmp_path / "12.npy", c2w[:, :3].reshape(F, 12))
    np.save(tmp_path / "16.npy", c2w.reshape(F, 16))
    np.savetxt(tmp_path / "16.txt", c2w.reshape(F, 16))
    rows = [[33367 * i, 0.6, 1.07, 0.5, 0.4, 0, 0, *m[:3].ravel()] for i, m in enumerate(w2c)]
    text = "\n".join(" ".join(f"{v:.9f}" for v in row) for row in rows)
    (tmp_path / "re10k.txt").write_text(f"https://example.org/watch?v=x\n{text}\n")
    (tmp_path / "bare.txt").write_text(text)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        np.testing.assert_allclose(read_poses(file).c2w, c2w, atol=1e-5, err_msg=file.name)
    in_pixels = read_poses(tmp_path / "re10k.txt").intrinsics_of(200, 100)
    assert in_pixels is not None
    np.testing.assert_allclose(in_pixels[3], [120, 107, 100, 40], rtol=1e-5)
    for inds in (order.astype(float), order[:-1], np.where(order == 3, 99, order)):
        np.savez(tmp_path / "vipe.npz", data=c2w[order], inds=inds)
        with pytest.raises(InputError, match=r"vipe\.npz: inds"):
            read_poses(tmp_path / "vipe.npz")


@pytest.mark.parametrize("direction", ["c2w", "w2c"])
@pytest.mark.parametrize("axes", ["opencv", "opengl"])
def test_other_conventions(axes: str, direction: str, c2w: np.ndarray, tmp_path: Path) -> None:
    given = c2w * [1, -1, -1, 1] if axes == "opengl" else c2w
    given = np.linalg.inv(given) if direction == "w2c" else given
    np.save(tmp_path / "x.npy", given)
    write_kitti(tmp_path / "x.txt", given)
    write_tum(tmp_path / "tum.txt", given)
    for name in ("x.npy", "x.txt", "tum.txt"):
        found = read_poses(tmp_path / name, axes=axes, direction=direction).c2w
        np.testing.assert_allclose(found, c2w, atol=1e-5)
    write_nerfstudio(tmp_path / "transforms.json", c2w)
    if (axes, direction) != ("opencv", "c2w"):
        with pytest.raises(InputError, match="nerfstudio defines its axes itself"):
            read_poses(tmp_path / "transforms.json", axes=axes, direction=direction)
    with pytest.raises(InputError, match="axes='y-up' of the camera path"):
        read_poses(tmp_path / "x.npy", axes="y-up")


def test_quaternions_with_w_first(c2w: np.ndarray, tmp_path: Path) -> None:
    write_tum(tmp_path / "a.txt", c2w)
    rows = np.loadtxt(tmp_path / "a.txt")
    np.savetxt(tmp_path / "b.txt", rows[:, [0, 1, 2, 3, 7, 4, 5, 6]])
    np.testing.assert_allclose(read_poses(tmp_path / "b.txt", "tum_wxyz").c2w, c2w, atol=1e-5)


def test_rotations_that_text_has_rounded(c2w: np.ndarray, tmp_path: Path) -> None:
    """Three decimals are made rigid; what is no rounding is refused, in text and in arrays."""
    for digits, is_good in ((3, True), (1, False)):
        np.savetxt(tmp_path / "x.txt", c2w[:, :3].reshape(F, 12), fmt=f"%.{digits}f")
        if not is_good:
            with pytest.raises(InputError, match="remove scale and shear"):
                read_poses(tmp_path / "x.txt")
            continue
        found = read_poses(tmp_path / "x.txt").c2w.astype(np.float64)
        gram = np.einsum("fji,fjk->fik", found[:, :3, :3], found[:, :3, :3])
        assert np.abs(gram - np.eye(3)).max() < 2e-3
        np.testing.assert_allclose(found, c2w, atol=2e-3)
    scaled = c2w.copy()
    scaled[:, :3, :3] *= 1.004
    np.save(tmp_path / "x.npy", scaled)
    with pytest.raises(InputError, match="remove scale and shear"):
        read_poses(tmp_path / "x.npy")


@pytest.mark.parametrize("intrinsics", [[1.0, 2], np.ones((5, 4)), [[1, 2, 3, np.nan]], "text"])
def test_intrinsics_that_do_not_fit(intrinsics, c2w: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", c2w=c2w, intrinsics=intrinsics)
    with pytest.raises(InputError, match=r"x\.npz: intrinsics: "):
        read_poses(tmp_path / "x.npz")


def test_images_that_cannot_be(c2w: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "transforms.json"
    for height in (6.8e38, 1e7):
        write_nerfstudio(file, c2w, h=height)
        with pytest.raises(InputError, match="pixels cannot be"):
            read_poses(file)
    write_nerfstudio(file, c2w, w=1, h=1, fl_x=1e38)
    with pytest.raises(InputError, match="too large for float32"):
        read_poses(file).intrinsics_of(64, 48)
