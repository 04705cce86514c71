"""Writing and reading the TFDS set, without TensorFlow."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.clip import HELD_OUT_SEED, make_clip
from sanawm_jax.small_world.generate import default_parts, main, part_fields, write_part
from sanawm_jax.small_world.tfds import find_parts, open_clips

pytest.importorskip("tensorflow_datasets")

SIZE = {"num_frames": 9, "height": 32, "width": 32}
ARGS = argparse.Namespace(scenes=2, validation=1, parts=2, first_seed=7, **SIZE)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for index in range(ARGS.parts):
        write_part(str(folder), part_fields(ARGS, index))
    assert "tensorflow" not in sys.modules
    return folder


def test_parts_share_the_seeds():
    args = argparse.Namespace(scenes=10, validation=3, parts=4, first_seed=0, **SIZE)
    fields = [part_fields(args, i) for i in range(4)]
    train = [f["first_seed"] + k for f in fields for k in range(f["num_scenes"])]
    held = [f["first_held_out"] + k for f in fields for k in range(f["num_held_out"])]
    assert train == list(range(10)) and held == list(range(3))


def test_clips_come_back_as_they_were_made(data_dir):
    train, held_out = open_clips(data_dir, "train"), open_clips(data_dir, "validation")
    assert len(train) == 2 and len(held_out) == 1
    for source, index, seed in ((train, 0, 7), (train, -1, 8), (held_out, 0, HELD_OUT_SEED)):
        clip, expected = source[index], make_clip(seed, **SIZE)
        assert set(clip) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(clip[name], value, err_msg=name)
            assert type(clip[name]) is type(value)
            assert getattr(clip[name], "dtype", None) == getattr(value, "dtype", None)
    with pytest.raises(IndexError):
        train[2]
    assert "tensorflow" not in sys.modules


def test_named_parts_are_read_alone(data_dir):
    parts = find_parts(data_dir)
    assert parts == ["part_000_of_002", "part_001_of_002"]
    assert [c["seed"] for c in open_clips(data_dir, "train", parts[1:])] == [8]


def test_finished_parts_are_kept_and_checked(data_dir):
    files = sorted(p for p in data_dir.rglob("*array_record*"))
    before = [p.stat().st_mtime_ns for p in files]
    write_part(str(data_dir), part_fields(ARGS, 0))
    assert [p.stat().st_mtime_ns for p in files] == before
    other = part_fields(ARGS, 0) | {"first_seed": 100}
    with pytest.raises(InputError, match="other clips"):
        write_part(str(data_dir), other)


def test_missing_sets_are_named(data_dir, tmp_path):
    with pytest.raises(InputError, match="generate"):
        open_clips(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'test'"):
        open_clips(data_dir, "test")
    folder = tmp_path / "small_world" / "part_000_of_003" / "1.1.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="1 of 3 parts"):
        find_parts(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenes", "1", "--parts", "2"], "less than one for each"),
        (["--scenes", "2000000"], "lower --scenes"),
        (["--workers", "0"], "--workers must be"),
        (["--scenes", "9", "--parts", "3"], "add --parts 2"),
    ],
)
def test_bad_arguments_end_with_one_line(data_dir, capsys, flags, message):
    assert main(["--data_dir", str(data_dir), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_parts_stay_small():
    values = {"num_frames": 49, "height": 128, "width": 128}
    args = argparse.Namespace(scenes=10_000, validation=100, workers=8, **values)
    parts = default_parts(args)
    assert parts % 8 == 0 and 10_100 / parts * 49 * 128 * 128 * 3 < 1 << 29
    args.scenes, args.validation = 3, 0
    assert default_parts(args) == 3


def test_command_line_generates_a_set(tmp_path):
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    flags = ["--scenes", "2", "--validation", "1", "--workers", "1", "--parts", "2", *size]
    assert main(["--data_dir", str(tmp_path), *flags]) == 0
    assert [c["seed"] for c in open_clips(tmp_path, "train")] == [0, 1]
    assert [c["seed"] for c in open_clips(tmp_path, "validation")] == [HELD_OUT_SEED]
