"""Every writer of files leaves a complete file or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanawm_jax.data.latent_cache import _write_progress
from sanawm_jax.media.video import write_gif, write_mp4
from sanawm_jax.runtime.atomic import atomic_write, check_output
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.json_file import read_note
from sanawm_jax.sampling.latents import write_npy


class Full(Exception):
    """The disk is full."""


class Unsaveable:
    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise Full


def frames_then_failure() -> Iterator[np.ndarray]:
    yield np.zeros((16, 16, 3), np.uint8)
    raise Full


def fail_by_hand(path: Path) -> None:
    with atomic_write(path) as partial:
        assert partial.parent == path.parent and partial.suffix == path.suffix
        partial.write_bytes(b"half")
        raise Full


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.npy": lambda path: write_npy(path, Unsaveable()),
    "a.mp4": lambda path: write_mp4(path, frames_then_failure(), 16),
    "a.gif": lambda path: write_gif(path, frames_then_failure(), 16),
    "a.bin": fail_by_hand,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(Full):
        WRITERS[name](tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(Full):
        WRITERS[name](tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


def test_progress_of_the_cache(tmp_path: Path) -> None:
    _write_progress(tmp_path, {"done": 1})
    before = (tmp_path / "progress.json").read_bytes()
    with pytest.raises(TypeError):
        _write_progress(tmp_path, {"done": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["progress.json"]
    assert (tmp_path / "progress.json").read_bytes() == before


def test_a_good_write_replaces(tmp_path: Path) -> None:
    for value in (b"one", b"two"):
        with atomic_write(tmp_path / "a") as partial:
            partial.write_bytes(value)
        assert (tmp_path / "a").read_bytes() == value
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 245, "too long"),
        ("folder", "is a folder"),
        ("file/x.mp4", "Not a directory|File exists"),
    ],
)
def test_an_output_that_cannot_be_written(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=says):
        check_output(tmp_path / name)
    check_output(tmp_path / "new" / "x.mp4")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("content", [b"\0" * 40, b"", b'{"done"', b"[]", b'{"done": "x"}', b"\xff"])
def test_a_damaged_note_is_empty(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "note.json").write_bytes(content)
    assert read_note(tmp_path / "note.json") == {} == read_note(tmp_path / "absent.json")
    (tmp_path / "note.json").write_text('{"done": 3}')
    assert read_note(tmp_path / "note.json") == {"done": 3}
