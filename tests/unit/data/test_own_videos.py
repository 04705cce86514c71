"""A person's films, folders of images and cameras: right values, or one line that says why not."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.pose_files import read_poses
from sanawm_jax.data.clip_report import write_report
from sanawm_jax.data.fingerprints import difference, fingerprint
from sanawm_jax.data.own_cameras import read_tracks
from sanawm_jax.data.own_videos import (
    OwnVideo,
    find_videos,
    load_clip,
    read_captions,
    read_own_video,
)
from sanawm_jax.runtime.errors import InputError
from tests.own_files import HEIGHT, WIDTH, K, N, film, images, npz, set_matrix, straight, transforms

NAMES = [f"frame_{i:03d}.png" for i in range(N)]


def own(video: Path, poses: Path, **options: object) -> OwnVideo:
    given = {"num_frames": N, **options}
    return read_own_video("clip", video, read_poses(poses), "", **given)  # pyright: ignore


def depths(video: OwnVideo) -> list[float]:
    """Where each camera stands on the way ahead, in units of 0.05."""
    return np.round(np.abs(video.c2w[:, 2, 3]) / 0.05).tolist()


def intrinsics(video: OwnVideo, size: int = HEIGHT) -> np.ndarray:
    return load_clip(video, size, size).intrinsics[0]


@pytest.mark.parametrize(
    "names",
    [
        [f"{'train' if i % 2 else 'eval'}/{n}" for i, n in enumerate(NAMES)],
        [f"C:\\scene\\{n}" for n in NAMES],
        [f"./images/{n.removesuffix('.png')}" for n in NAMES],
        [n.replace("png", "JPG") for n in NAMES],
    ],
)
@pytest.mark.parametrize("is_film", [False, True])
def test_poses_belong_to_frames_by_name(names, is_film: bool, tmp_path: Path) -> None:
    video = film(tmp_path / "clip.mp4") if is_film else images(tmp_path / "clip", NAMES)
    order = np.random.default_rng(0).permutation(N)
    file = transforms(tmp_path / "poses", names)
    content = __import__("json").loads(file.read_text())
    content["frames"] = [content["frames"][n] for n in order]
    file.write_text(__import__("json").dumps(content))
    assert depths(own(video, file)) == list(range(N))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [f"images/frame_{i + 100:03d}.png" for i in range(N)],
            "frame_000.png, .* and 6 more have no",
        ),
        ([*NAMES[:-1], "frame_100.png"], "images frame_008.png have no pose"),
        (NAMES[:-1], "images frame_008.png have no pose"),
        ([*NAMES, "frame_009.png"], "poses frame_009 have no image"),
        ([*(f"a/{n}" for n in NAMES[:-1]), "b/frame_000.png"], "two frames of one name"),
    ],
)
def test_names_without_partner(names: list[str], message: str, tmp_path: Path) -> None:
    images(tmp_path / "clip", NAMES)
    with pytest.raises(InputError, match=message):
        own(tmp_path / "clip", transforms(tmp_path / "poses", names))


def test_two_images_of_one_name(tmp_path: Path) -> None:
    images(tmp_path / "clip", [*NAMES, "frame_000.jpg"])
    with pytest.raises(InputError, match=r"two entries frame_000"):
        own(tmp_path / "clip", npz(tmp_path / "p.npz", N + 1))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "ts", "avi", "mov"])
def test_frames_are_counted_in_every_container(ending: str, tmp_path: Path) -> None:
    video = film(tmp_path / f"clip.{ending}", 11)
    with pytest.raises(InputError, match="has 11 frames and its camera 9 poses"):
        own(video, npz(tmp_path / "p.npz"))
    found = own(video, npz(tmp_path / "q.npz", 11))
    assert depths(found) == list(range(N)) and found.facts.fps == pytest.approx(16, rel=0.01)
    assert load_clip(found, HEIGHT, WIDTH).video.shape == (N, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((0, 1, -1, 0), "bl tl br tr"),  # a telephone held upright
        ((0, -1, 1, 0), "tr br tl bl"),
        ((-1, 0, 0, -1), "br bl tr tl"),
        ((-1, 0, 0, 1), "tr tl br bl"),  # a mirror, as of a front camera
        ((0, 1, 1, 0), "tl bl tr br"),
    ],
)
def test_films_are_shown_as_players_show_them(matrix, corners: str, tmp_path: Path) -> None:
    plain = load_clip(own(film(tmp_path / "a.mp4"), npz(tmp_path / "p.npz")), HEIGHT, WIDTH)
    stored = dict(zip(("tl", "tr", "bl", "br"), _corners(plain.video[0]), strict=True))
    set_matrix(film(tmp_path / "b.mp4"), matrix)
    found = own(tmp_path / "b.mp4", tmp_path / "p.npz")
    is_turned = not matrix[0]
    shown = (HEIGHT, WIDTH) if is_turned else (WIDTH, HEIGHT)
    assert found.facts.shown == shown
    clip = load_clip(found, shown[1], shown[0])
    expected = [stored[name] for name in corners.split()]
    np.testing.assert_allclose(_corners(clip.video[0]), expected, atol=3)


def _corners(frame: np.ndarray) -> list[np.ndarray]:
    return [frame[y, x].astype(int) for y in (3, -4) for x in (3, -4)]


def test_a_turned_film_needs_the_camera_of_what_is_shown(tmp_path: Path) -> None:
    set_matrix(film(tmp_path / "a.mp4"), (0, 1, -1, 0))
    upright = npz(tmp_path / "u.npz", intrinsics=[40, 40, 16, 24.0], width=HEIGHT, height=WIDTH)
    np.testing.assert_allclose(intrinsics(own(tmp_path / "a.mp4", upright)), [40, 40, 16, 16])
    stored = npz(tmp_path / "s.npz", intrinsics=K, width=WIDTH, height=HEIGHT)
    with pytest.raises(InputError, match="48x32 pixels and the pictures are 32x48: one of the two"):
        own(tmp_path / "a.mp4", stored)
    with pytest.warns(UserWarning, match="far from the centre"):
        own(tmp_path / "a.mp4", npz(tmp_path / "n.npz", intrinsics=K))
    other = npz(tmp_path / "o.npz", intrinsics=K, width=WIDTH, height=WIDTH)
    with pytest.raises(InputError, match="another shape"):
        own(film(tmp_path / "b.mp4"), other)
    twice = [2 * v for v in K]
    double = npz(tmp_path / "d.npz", intrinsics=twice, width=2 * WIDTH, height=2 * HEIGHT)
    np.testing.assert_allclose(intrinsics(own(tmp_path / "b.mp4", double)), [40, 40, 16, 16])


def test_pictures_beside_a_camera_of_stored_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images(tmp_path / "clip", [n.replace("png", "jpg") for n in NAMES], exif=exif)
    stored = npz(tmp_path / "s.npz", intrinsics=K, width=WIDTH, height=HEIGHT)
    with pytest.raises(InputError, match="turned by 90 degrees"):
        own(tmp_path / "clip", stored)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """A film of 24 x 32 stored pixels that are twice as wide as high is shown as 48 x 32."""
    film(tmp_path / "b.mkv", width=WIDTH // 2, aspect=2)
    found = own(tmp_path / "b.mkv", npz(tmp_path / "p.npz", intrinsics=K))
    assert found.facts.shown == (WIDTH, HEIGHT) and found.facts.stored == (WIDTH // 2, HEIGHT)
    np.testing.assert_allclose(intrinsics(found), [40, 40, 16, 16])
    stored = [20, 40, 12, 16.0]  # what a reconstruction of the stored pixels has
    sized = npz(tmp_path / "q.npz", intrinsics=stored, width=WIDTH // 2, height=HEIGHT)
    np.testing.assert_allclose(intrinsics(own(tmp_path / "b.mkv", sized)), [40, 40, 16, 16])


def test_all_frames_have_one_size(tmp_path: Path) -> None:
    images(tmp_path / "clip", NAMES)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "clip" / NAMES[8])
    with pytest.raises(InputError, match=r"frame frame_008\.png is 32x48 and the frames before it"):
        own(tmp_path / "clip", npz(tmp_path / "p.npz"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"camera_angle_x": 2 * np.arctan(24 / 40)}, [40, 40, 16, 16]),
        ({"camera_angle_y": 2 * np.arctan(16 / 40)}, [40, 40, 16, 16]),
        ({"camera_angle_x": 2 * np.arctan(24 / 40), "w": 96, "h": 64}, [40, 40, 16, 16]),
        ({"fl_x": 40.0}, [40, 40, 16, 16]),
        ({"fl_x": 40.0, "fl_y": 30.0, "cx": 20.0}, [40, 30, 12, 16]),
        ({"fl_x": 80.0, "cx": 48.0, "cy": 32.0, "w": 96, "h": 64}, [40, 40, 16, 16]),
    ],
)
def test_intrinsics_of_a_transforms_json(more: dict, expected: list, tmp_path: Path) -> None:
    found = own(film(tmp_path / "clip.mp4"), transforms(tmp_path, NAMES, **more))
    np.testing.assert_allclose(intrinsics(found), expected, rtol=1e-5)
    assert found.origin.startswith("camera file")


@pytest.mark.parametrize(
    "numbers",
    [[0.78, 1.17, 0.5, 0.5], [35, 35, 240, 160], [1.6, 1.6, 0, 0], [4000, 4000, 24, 16]],
)
def test_intrinsics_in_another_unit(numbers: list[float], tmp_path: Path) -> None:
    video = film(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match=r"clip\.mp4: intrinsics .* are not in pixels"):
        own(video, npz(tmp_path / "p.npz", intrinsics=numbers))
    text = ",".join(map(str, numbers))
    with pytest.raises(InputError, match="are not in pixels"):
        own(video, npz(tmp_path / "q.npz"), intrinsics=text)


def test_unlikely_intrinsics_are_a_warning(tmp_path: Path) -> None:
    video = film(tmp_path / "clip.mp4")
    with pytest.warns(UserWarning, match=r"clip\.mp4: intrinsics: a field of view of 20\.5"):
        own(video, npz(tmp_path / "p.npz"), intrinsics="133,133,24,16")
    fractions = npz(tmp_path / "f.npz", intrinsics=[40 / 48, 40 / 32, 0.5, 0.5], width=1, height=1)
    np.testing.assert_allclose(intrinsics(own(video, fractions)), [40, 40, 16, 16])
    rows = np.tile(K, (N, 1)) + np.arange(N)[:, None] * [1, 1, 0, 0]
    np.save(tmp_path / "rows.npy", rows)
    found = own(video, npz(tmp_path / "p.npz"), intrinsics=str(tmp_path / "rows.npy"))
    np.testing.assert_allclose(load_clip(found, HEIGHT, WIDTH).intrinsics, rows)
    np.save(tmp_path / "rows.npy", rows[:5])
    with pytest.raises(InputError, match=r"5 entries and .* has 9 frames"):
        own(video, npz(tmp_path / "p.npz"), intrinsics=str(tmp_path / "rows.npy"))


def test_films_of_another_rate(tmp_path: Path) -> None:
    found = own(film(tmp_path / "a.mp4", 17, rate=32), npz(tmp_path / "p.npz", 17), fps=16)
    assert found.numbers.tolist() == depths(found) == list(range(0, 17, 2))
    found = own(film(tmp_path / "b.mp4", 17, rate=30), npz(tmp_path / "p.npz", 17), fps=16)
    assert found.numbers.tolist() == [0, 2, 4, 6, 7, 9, 11, 13, 15]
    for options, step in (({"fps": 0}, 1), ({"fps": 16, "frame_step": 2}, 2)):
        found = own(tmp_path / "a.mp4", tmp_path / "p.npz", **options)
        assert found.numbers.tolist() == list(range(0, step * N, step))
    with pytest.raises(InputError, match="17 frames of 32 a second, of which 9 are used, too few"):
        own(tmp_path / "a.mp4", tmp_path / "p.npz", fps=16, num_frames=17)
    with pytest.raises(InputError, match="has 8 frames a second, fewer than 16"):
        own(film(tmp_path / "c.mp4", rate=8), npz(tmp_path / "q.npz"), fps=16)
    assert depths(own(film(tmp_path / "d.mp4", rate=15), tmp_path / "q.npz", fps=16))[-1] == 8


def test_companions_of_macos_are_no_frames(tmp_path: Path) -> None:
    images(tmp_path / "videos" / "clip", NAMES)
    for name in NAMES:
        (tmp_path / "videos" / "clip" / f"._{name}").write_bytes(b"\0\5\x16\7")
    (tmp_path / "videos" / "._clip.mp4").write_bytes(b"\0\5\x16\7")
    npz(tmp_path / "poses" / "clip.npz")
    (tmp_path / "poses" / "._clip.npz").write_bytes(b"\0\5\x16\7")
    assert list(find_videos(tmp_path / "videos")) == ["clip"]
    track = read_tracks(tmp_path / "poses", ["clip"])["clip"]
    found = read_own_video("clip", tmp_path / "videos/clip", track, "", num_frames=N)
    assert len(found.facts.times) == N


def test_names_in_two_unicode_forms(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    film(tmp_path / "videos" / f"{apart}.mp4")
    (tmp_path / "videos" / f"{composed}.txt").write_text("a bar")
    npz(tmp_path / "poses" / f"{composed}.npz")
    videos = find_videos(tmp_path / "videos")
    assert list(videos) == [composed] and videos[composed].is_file()
    assert len(read_tracks(tmp_path / "poses", list(videos))[composed].c2w) == N
    assert read_captions(None, videos) == {composed: "a bar"}
    (tmp_path / "captions.json").write_text(f'{{"{apart}": "a café"}}', encoding="utf-8-sig")
    assert read_captions(tmp_path / "captions.json", videos) == {composed: "a café"}
    ids, pose = np.array([apart]), straight()
    np.savez(tmp_path / "c.npz", ids=ids, ranges=[[0, N]], pose=pose, intrinsics=np.tile(K, (N, 1)))
    assert len(read_tracks(tmp_path / "c.npz", [composed])[composed].c2w) == N
    film(tmp_path / "videos" / f"{composed}.mp4")
    with pytest.raises(InputError, match="have one name"):
        find_videos(tmp_path / "videos")


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    video = own(film(tmp_path / "a.mp4"), npz(tmp_path / "p.npz", intrinsics=K))
    old = fingerprint(video, "float32")
    assert difference(old, fingerprint(video, "float32", old)) is None
    assert difference(old, fingerprint(video, "bfloat16", old)) == "another --dtype"
    for more, what in (
        ({"intrinsics": [41, *K[1:]]}, "other intrinsics"),
        ({}, "other intrinsics"),
    ):
        changed = own(tmp_path / "a.mp4", npz(tmp_path / "p.npz", **more))
        assert difference(old, fingerprint(changed, "float32", old)) == what
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())  # copied: another time
    assert difference(old, fingerprint(video, "float32", old)) is None
    film(tmp_path / "a.mp4", 10)
    assert difference(old, fingerprint(video, "float32", old)) == "another film"


def test_report_of_a_clip(tmp_path: Path) -> None:
    video = own(film(tmp_path / "a.mp4"), npz(tmp_path / "p.npz", intrinsics=K))
    clip = load_clip(video, HEIGHT, HEIGHT)
    facts = write_report(tmp_path / "reports", video, clip)
    expected = {
        "frames": N,
        "frames_used": N,
        "fps": 16.0,
        "size": [WIDTH, HEIGHT],
        "field_of_view_encoded": [43.6, 43.6],
        "intrinsics_from": "camera file",
        "path_length": 0.4,
        "turned_degrees": 0.0,
    }
    assert {name: facts[name] for name in expected} == expected
    with Image.open(tmp_path / "reports" / "clip.png") as sheet:
        assert sheet.size[0] == 1280
        # what a camera that goes straight ahead looks at is the centre of the picture
        assert sheet.convert("RGB").getpixel((160, 160)) == (255, 196, 61)
