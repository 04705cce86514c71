"""Zip latents: reading of upstream's layout, filters, and bad samples."""

from __future__ import annotations

import json
import pickle
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.data.bad_samples import BadSample, BadSampleCounter
from sanawm_jax.data.zip_index import Selection, ZipIndex, index_zips
from sanawm_jax.data.zip_latents import ZipLatents, camera_tensors
from sanawm_jax.data.zip_sidecars import caption_of, read_records, score_of
from sanawm_jax.data.zip_writer import write_zip_latents
from sanawm_jax.runtime.errors import InputError
from tests.zip_set import FRAMES, SHAPE, SIZE, flip_bytes, folders, make_sample, write_set


def index_of(folder: Path, counter: BadSampleCounter | None = None, **selection) -> ZipIndex:
    selection.setdefault("min_latent_file_size", 0)
    counter = counter or BadSampleCounter()
    return index_zips(folders(folder), Selection(**selection), counter)


def keys_of(index: ZipIndex) -> list[str]:
    return [item.key for item in index.items]


def expected_camera(pose, intrinsics, size, frames, height, width, scale):
    """Computes camera tokens (F, 20) and Plücker maps (48, F, H, W) as upstream's code does."""
    pose = pose.astype(np.float64)
    pose[:, :3, 3] *= scale
    pose = np.linalg.inv(pose[0]) @ pose
    pose[0] = np.eye(4)
    to_grid = np.array([width / size[0], height / size[1]] * 2)
    intrinsics = intrinsics * to_grid
    times = [min(8 * i, (len(pose) - 1) // 8 * 8) for i in range(frames)]
    tokens = np.concatenate([pose[times].reshape(frames, 16), intrinsics[times]], 1)
    maps = np.zeros((48, frames, height, width))
    for t in range(frames):
        start = max(0, 8 * t - 7)
        for slot in range(8):
            n = min(start + slot, len(pose) - 1)
            fx, fy, cx, cy = intrinsics[n]
            for y in range(height):
                for x in range(width):
                    d = pose[n, :3, :3] @ [(x - cx) / fx, (y - cy) / fy, 1]
                    d /= np.linalg.norm(d)
                    moment = np.cross(pose[n, :3, 3], d)
                    maps[6 * slot : 6 * slot + 6, t, y, x] = np.concatenate([d, moment])
    return tokens, maps


@pytest.mark.parametrize(("poses", "scale"), [(17, 1.0), (17, 2.5), (25, 0.4), (13, 1.0)])
def test_cameras_equal_the_facts(poses: int, scale: float) -> None:
    sample = make_sample("a", 5)
    rng = np.random.default_rng(1)
    order = np.minimum(np.arange(poses), FRAMES - 1)
    pose = sample.c2w[order]
    intrinsics = (sample.intrinsics[order] * rng.uniform(0.9, 1.1, (poses, 1))).astype(np.float32)
    camera, plucker = camera_tensors(pose, intrinsics, SIZE, SHAPE[:3], scale=scale)
    tokens, maps = expected_camera(pose[:17], intrinsics[:17], SIZE, *SHAPE[:3], scale)
    np.testing.assert_allclose(camera, tokens, atol=2e-5)
    np.testing.assert_allclose(plucker.transpose(3, 0, 1, 2), maps, atol=2e-5)
    assert camera.dtype == plucker.dtype == np.float32
    np.testing.assert_array_equal(camera[0, :16], np.eye(4).ravel())


def test_bad_cameras() -> None:
    sample = make_sample("a", 5)
    for pose, intrinsics, message in (
        (sample.c2w[:9], sample.intrinsics, "9 poses and 17 intrinsics for 17 pixel frames"),
        (np.where(np.arange(17)[:, None, None] == 3, np.nan, sample.c2w), sample.intrinsics, "NaN"),
        (2 * sample.c2w, sample.intrinsics, "not a rigid"),
        (sample.c2w, -sample.intrinsics, "focal lengths must be positive"),
        (sample.c2w, sample.intrinsics / 64, "degrees of view; the unit must be pixels"),
    ):
        with pytest.raises(InputError, match=message):
            camera_tensors(pose, intrinsics, SIZE, SHAPE[:3])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    index = index_of(write_set(tmp_path))
    source = ZipLatents(index, 3, repeat=2)
    assert source.measure() == (5, 2, 4)
    assert len(source) == 24 and keys_of(index)[:5] == ["s00", "s01", "s02", "s03", "s10"]
    assert index.captions() == sorted(f"prompt {10 * z + i}" for z in range(3) for i in range(4))
    row, sample = source[5], make_sample("s11", 11)
    np.testing.assert_array_equal(row["latents"], sample.latents)
    assert row["latents"].dtype == np.float32 and row["caption"] == "prompt 11"
    camera, plucker = camera_tensors(sample.c2w, sample.intrinsics, SIZE, SHAPE[:3])
    np.testing.assert_array_equal(row["camera"], camera)
    np.testing.assert_array_equal(row["plucker"], plucker)
    again = pickle.loads(pickle.dumps(source))  # open files stay behind
    np.testing.assert_array_equal(again[17]["latents"], row["latents"])
    with pytest.raises(IndexError):
        source[24]
    short = ZipLatents(index, 2)
    np.testing.assert_array_equal(short[5]["latents"], row["latents"][:2])
    np.testing.assert_array_equal(short[5]["camera"], row["camera"][:2])
    np.testing.assert_array_equal(short[5]["plucker"], row["plucker"][:2])
    with pytest.raises(BadSample, match="3 latent frames, fewer than 4") as caught:
        ZipLatents(index, 4)[0]
    assert not caught.value.problem.is_bad
    with zipfile.ZipFile(tmp_path / "latents" / "part.1.zip") as archive:
        z = np.load(archive.open("s11.npz"))["z"]  # upstream's order of axes
    np.testing.assert_array_equal(z, np.asarray(sample.latents).transpose(3, 0, 1, 2))


def test_metric_scale_and_bare_arrays(tmp_path: Path) -> None:
    sample = make_sample("a", 0, metric_scale=3.0)
    write_zip_latents(tmp_path, "x", [sample, make_sample("b", 1)])
    scales = json.loads((tmp_path / "raw" / "x_metric_scale_stats.json").read_text())
    assert scales == {"a": 3.0}
    source = ZipLatents(index_of(tmp_path), 3)
    expected, _ = camera_tensors(sample.c2w, sample.intrinsics, SIZE, SHAPE[:3], scale=3.0)
    np.testing.assert_array_equal(source[0]["camera"], expected)
    file = tmp_path / "latents" / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in "ab":
            with archive.open(f"{key}.npz", "w") as member:
                z = np.moveaxis(np.asarray(sample.latents), -1, 0)
                np.save(member, z) if key == "a" else np.savez_compressed(member, z)
    source = ZipLatents(index_of(tmp_path), 3)
    np.testing.assert_array_equal(source[0]["latents"], sample.latents)
    np.testing.assert_array_equal(source[1]["latents"], sample.latents)


def test_filters_and_size(tmp_path: Path) -> None:
    samples = [make_sample(f"k{i}", i, scores={"_dover": i / 4}) for i in range(5)]
    write_zip_latents(tmp_path, "x", samples)
    raw = tmp_path / "raw"
    (raw / "x_vmafmotion.jsonl").write_text(
        "".join(f'{{"key": "k{i}", "vmafmotion_score": {10 * i}}}\n' for i in (0, 1, 2, 3))
    )
    assert keys_of(index_of(tmp_path, filters=[("_dover", 0.25, 0.75)])) == ["k1", "k2", "k3"]
    # both bounds count, and without a score a sample is out
    both = index_of(tmp_path, filters=[("_dover", 0.25, 1), ("_vmafmotion", 20, 50)])
    assert keys_of(both) == ["k2", "k3"] and both.filtered == 3
    with pytest.raises(InputError, match=r"5 are outside data\.filters, 0 have latents"):
        index_of(tmp_path, filters=[("_unimatch", 3, 80)])
    size = 5 * 3 * 2 * 4 * 2
    assert len(index_of(tmp_path, min_latent_file_size=size).items) == 5
    with pytest.raises(
        InputError, match=r"5 have latents below data\.min_latent_file_size=10485760"
    ):
        index_of(tmp_path, min_latent_file_size=10 * 2**20)
    with pytest.raises(InputError, match="range 2 to 1"):
        Selection(filters=[("_dover", 2, 1)])
    with pytest.raises(InputError, match="weight 0"):
        Selection(captions=[("_long", 0)])


def test_scores_and_captions_of_records(tmp_path: Path) -> None:
    for record, score in (
        (3, 3.0),
        (True, 1.0),
        ([1, 2, "x", None], 1.5),
        ({"median": 7, "dover_score": 0.5}, 0.5),
        ({"name": "x", "anything": [2, 4]}, 3.0),
        ({"score": None, "other": 2}, 2.0),
        ("5", None),
        (float("nan"), None),
        ({}, None),
    ):
        assert score_of(record) == score
    assert caption_of({"other": 1, "text": "a", "prompt": "b"}) == "b"
    assert caption_of({"other": 1, "text": "a"}) == "a"
    assert caption_of("c") == "c" and caption_of(3) is None and caption_of({}) is None
    file = tmp_path / "x.json"
    file.write_text('[{"key": "a", "score": 1}]')
    assert read_records(file) == {"a": {"score": 1}}
    for text in ("[1]", "3", "{", '[{"score": 1}]'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"x\.json"):
            read_records(file)


def test_captions_are_drawn_by_weight(tmp_path: Path) -> None:
    captions = {"_a.b": "from a", "_c": "from c"}
    samples = [make_sample("k0", 0, captions=captions), make_sample("k1", 1)]
    write_zip_latents(tmp_path, "x", samples)
    source = ZipLatents(index_of(tmp_path, captions=[("_a.b", 30), ("_c", 10), ("_d", 99)]), 3)
    rng = np.random.default_rng(0)
    drawn = [source.read(0, rng)["caption"] for _ in range(400)]
    assert set(drawn) == {"from a", "from c"}
    assert 0.68 < drawn.count("from a") / 400 < 0.82
    assert source.read(1, rng)["caption"] == "prompt 1"  # has none of them
    assert source.index.captions() == ["from a", "from c", "prompt 1"]


def test_missing_and_damaged_files_are_counted_and_named(tmp_path: Path, caplog) -> None:
    write_set(tmp_path, zips=4)
    raw, latents = tmp_path / "raw", tmp_path / "latents"
    (raw / "part.0_camera.npz").unlink()
    (latents / "part.1.zip").write_bytes(b"PK no zip")
    flip_bytes(raw / "part.2.zip", "s21.json")
    counter = BadSampleCounter(max_fraction=0.6)
    with caplog.at_level("WARNING"):
        index = index_of(tmp_path, counter)
    assert keys_of(index) == ["s20", "s22", "s23", "s30", "s31", "s32", "s33"]
    assert (counter.seen, counter.bad) == (16, 9)
    for text in (
        "4 samples of",
        "part.0_camera.npz: there is no such file",
        "part.1.zip: it is no",
    ):
        assert text in caplog.text
    assert "sample s21" in caplog.text and "part.2.zip: s21.json is damaged" in caplog.text
    with pytest.raises(InputError, match=r"9 of 16 samples.*max_bad_fraction=0\.5"):
        index_of(tmp_path, BadSampleCounter(max_fraction=0.5, min_bad=9))
    index_of(tmp_path, BadSampleCounter(max_fraction=0.5, min_bad=10))  # too few to tell
    (raw / "part.3_dover.json").write_text("{")
    with pytest.raises(InputError, match="0 are outside"):
        for number in (0, 1, 2):
            (raw / f"part.{number}.zip").unlink()
        index_of(tmp_path, BadSampleCounter(0.5, 99), filters=[("_dover", 0, 1)])
    (raw / "part.3.zip").unlink()
    with pytest.raises(InputError, match="there are no zips in"):
        index_of(tmp_path)


def test_samples_that_cannot_be_read(tmp_path: Path) -> None:
    broken = np.where(np.arange(FRAMES)[:, None, None] == 3, np.nan, make_sample("", 1).c2w)
    infinite = np.full(SHAPE, np.inf, np.float16)
    write_zip_latents(
        tmp_path,
        "x",
        [
            make_sample("damaged", 0),
            make_sample("nan", 1, c2w=broken),
            make_sample("inf", 2, latents=infinite),
            make_sample("small", 3, latents=np.zeros((3, 2, 2, 5), np.float16)),
            make_sample("scaled", 4, c2w=2 * make_sample("", 4).c2w),
            make_sample("whole", 5),
        ],
    )
    flip_bytes(tmp_path / "latents" / "x.zip", "damaged.npz")
    index = index_of(tmp_path)
    source = ZipLatents(index, 3)
    source.shape = (5, 2, 4)
    for number, key in enumerate(keys_of(index)):
        expected = {
            "damaged": ("x.zip", "BadZipFile"),
            "nan": ("x_camera.npz", "row 3 holds NaN"),
            "inf": ("x.zip", "NaN or infinity"),
            "small": ("x.zip", r"\(5, 2, 2\), not \(5, 2, 4\)"),
            "scaled": ("x_camera.npz", "frame 0 is not a rigid"),
        }.get(key)
        if expected is None:
            assert np.isfinite(source[number]["latents"]).all()
            continue
        with pytest.raises(BadSample, match=expected[1]) as caught:
            source[number]
        problem = caught.value.problem
        assert problem.is_bad and problem.key == key and Path(problem.file).name == expected[0]
    # the first sample is damaged: the second one is measured
    assert source.measure() == (5, 2, 4)


def test_writer_refuses_keys_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        write_zip_latents(tmp_path, "x", [make_sample("a", 0), make_sample("a", 1)])
    assert not list(tmp_path.rglob("*.zip"))


def test_companions_and_names_in_two_unicode_forms(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_zip_latents(tmp_path, "part.0", [make_sample(composed, 1), make_sample("b", 2)])
    for folder, ending in (("raw", "json"), ("latents", "npz")):
        file = tmp_path / folder / "part.0.zip"
        with zipfile.ZipFile(file) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                if ending == "npz":
                    name = unicodedata.normalize("NFD", name)
                archive.writestr(name, content)
                archive.writestr(f"__MACOSX/._{name}", b"\0\5\x16\7")
                archive.writestr(f"._{name}", b"\0\5\x16\7")
        (tmp_path / folder / "._part.0.zip").write_bytes(b"\0\5\x16\7")
    counter = BadSampleCounter()
    index = index_zips(folders(tmp_path), Selection(min_latent_file_size=0), counter)
    assert counter.bad == 0 and keys_of(index) == ["b", composed]
    row = ZipLatents(index, 3)[1]
    np.testing.assert_array_equal(row["latents"], make_sample(composed, 1).latents)
    with zipfile.ZipFile(tmp_path / "raw/part.0.zip", "a") as archive:
        archive.writestr(f"{apart}.json", '{"width": 64, "height": 48}')
    with pytest.raises(InputError, match="no sample of the zips"):
        index_zips(folders(tmp_path), Selection(min_latent_file_size=0), BadSampleCounter())
