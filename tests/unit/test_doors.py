"""Files of every kind, generated and damaged: a right value, or one line for the user.

`test_doors` runs a few hundred examples of each kind. `-m slow` runs twenty thousand.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as save_tensors

from sanawm_jax.camera.intrinsics import parse_intrinsics
from sanawm_jax.camera.pose_files import read_poses
from sanawm_jax.camera.recorded_keys import read_actions
from sanawm_jax.checkpoints.adapters import load_adapters
from sanawm_jax.checkpoints.files import SafetensorsFolder, published_fields, read_config
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.data.bad_samples import BadSample, BadSampleCounter
from sanawm_jax.data.own_cameras import read_tracks
from sanawm_jax.data.own_videos import load_clip, read_own_video
from sanawm_jax.data.zip_index import Selection, index_zips
from sanawm_jax.data.zip_latents import ZipLatents
from sanawm_jax.data.zip_sidecars import read_records
from sanawm_jax.data.zip_writer import write_zip_latents
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.media.image import load_image, shown_size
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.training.engine.line_file import truncate
from sanawm_jax.vae.config import VAEConfig
from tests.own_files import K, N, film, npz, straight, transforms
from tests.unit.checkpoints.test_adapters import ABSTRACT, TABLE, factors, named
from tests.zip_set import folders, make_sample

EXAMPLES, MANY = 200, 20_000
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    SCALARS, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=5), c, max_size=4)
)


class Door(NamedTuple):
    """A way in: what is tried, and the code that it is tried on."""

    values: st.SearchStrategy[Any]
    use: Callable[[Path, Any], object]


def damaged(*contents: bytes) -> st.SearchStrategy[bytes]:
    """One of some files, cut, with bytes replaced, or with other bytes inserted."""
    edits = st.tuples(
        st.sampled_from(["cut", "replace", "insert", "zeros", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    )

    def apply(content: bytes, steps: list[tuple[str, float, bytes]]) -> bytes:
        for how, place, new in steps:
            at = int(place * len(content))
            end = {"replace": at + len(new), "zeros": at + 64}.get(how, at)
            new = {"cut": b"", "zeros": bytes(64), "repeat": content[:at][-99:]}.get(how, new)
            content = content[:at] + new + (b"" if how == "cut" else content[end:])
        return content

    return st.builds(apply, st.sampled_from(contents), st.lists(edits, max_size=3))


def changed(content: Any) -> st.SearchStrategy[Any]:
    """JSON like `content`, in which some values or entries are others."""
    if isinstance(content, dict):
        entries = {name: changed(value) for name, value in content.items()}
        whole = st.fixed_dictionaries({}, optional=entries) | st.fixed_dictionaries(entries)
        return st.just(content) | whole | JSON
    if isinstance(content, list):
        parts = st.tuples(*map(changed, content)).map(list)
        return st.just(content) | parts | st.lists(st.sampled_from(content), max_size=9) | JSON
    return st.just(content) | st.just(content) | SCALARS


def as_text(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def file_door(name: str, use: Callable[[Path], object], values: st.SearchStrategy[bytes]) -> Door:
    """A door that reads one file of this name."""

    def write(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return use(folder / name)

    return Door(values, write)


def saved(save: Callable[..., Any], *given: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *given, **options)
    return buffer.getvalue()


def made(make: Callable[[Path], object], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def pose(path: Path) -> None:
    track = read_poses(path)
    assert np.isfinite(track.c2w).all() and track.c2w.shape[1:] == (4, 4)
    rows = track.intrinsics_of(64, 48)
    assert rows is None or (np.isfinite(rows).all() and (rows[:, :2] >= 0).all())


def rows_of(columns: int) -> st.SearchStrategy[bytes]:
    numbers = st.sampled_from(["0", "1", "-1", "0.5", "1e-3", "nan", "inf", "1e40", "x", "#"])
    row = st.lists(numbers, min_size=columns, max_size=columns).map(" ".join)
    return st.lists(row, min_size=1, max_size=4).map(lambda r: "\n".join(r).encode())


def picture(path: Path) -> None:
    image = load_image(path)
    assert image.mode == "RGB" and image.size == shown_size(path)


def clip(path: Path) -> None:
    npz(path.with_name("p.npz"), intrinsics=K)
    track = read_poses(path.with_name("p.npz"))
    video = read_own_video("x", path, track, "", num_frames=N, fps=16)
    # K is of 48 x 32, and damage may have changed the size
    assert load_clip(video, 32, 32).video.shape == (N, 32, 32, 3)


def lines(path: Path) -> None:
    truncate(path, 2)
    *whole, rest = path.read_bytes().split(b"\n")
    assert not rest and all(json.loads(line.decode())["step"] <= 2 for line in whole)


def tensors(path: Path) -> None:
    source = SafetensorsFolder(path.parent)
    for key in source.keys():
        assert source.read(key).shape == source.shape(key)


def zips(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    counter = BadSampleCounter()
    index = index_zips(folders(folder), Selection((), (("_cap", 1.0),), 0), counter)
    source = ZipLatents(index, 2)
    for number in range(len(source)):
        try:
            assert np.isfinite(source[number]["camera"]).all()
        except BadSample as error:
            assert "\n" not in str(error)


def config(folder: Path, content: Any) -> None:
    kind, value = content
    (folder / "config.json").write_bytes(as_text(value))
    kind.from_json(read_config(folder))


@functools.cache
def doors() -> dict[str, Door]:
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder)
        nerf = json.loads(transforms(sample, ["a.png", "b.png"], fl_x=40.0, w=48, h=32).read_text())
        write_zip_latents(sample, "part", [make_sample("a", 1), make_sample("b", 2)])
        kinds = {f"{d}/{n}": (sample / d / n).read_bytes() for d, n in ZIP_FILES}
    text = "\n".join(" ".join(map(str, m[:3].ravel())) for m in straight(3)).encode()
    arrays = saved(np.savez, c2w=straight(3), intrinsics=K, width=48, height=32)
    sidecar = saved(
        np.savez, ids=["x"], ranges=[[0, 3]], pose=straight(3), intrinsics=np.tile(K, (3, 1))
    )
    keys = [{"keys": "w", "frames": 4}, {"keys": ["w", "d"]}, "wd", ["w"], {"w": True}]
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    images = [saved(image.save, kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")]
    adapter = named(factors())
    metrics = b"".join(b'{"step": %d, "loss": 1.5}\n' % n for n in (1, 2, 3))
    index = {"metadata": {}, "weight_map": {"a": "w.safetensors"}}
    vae, gemma = published_fields(TINY.vae), GemmaConfig().to_json()
    named_json = [(DiTConfig, published_fields(TINY.dit)), (VAEConfig, vae), (GemmaConfig, gemma)]

    def sidecar_tracks(path: Path) -> None:
        assert read_tracks(path, ["x"])["x"].c2w.shape[1:] == (4, 4)

    def action(_: Path, value: str) -> None:
        assert read_actions(value)

    def text_of_intrinsics(_: Path, value: str) -> None:
        assert parse_intrinsics(value, 3).shape == (3, 4)

    def records(path: Path) -> None:
        assert isinstance(read_records(path), dict)

    return {
        "text poses": file_door(
            "p.txt", pose, st.one_of(*map(rows_of, (8, 12, 16, 19))) | damaged(text)
        ),
        "array poses": file_door("p.npz", pose, damaged(arrays, saved(np.save, straight(3)))),
        "camera sidecar": file_door("c.npz", sidecar_tracks, damaged(sidecar)),
        "transforms.json": file_door("transforms.json", pose, changed(nerf).map(as_text)),
        "captions": file_door(
            "c.json", records, changed({"a": "x", "b": {"prompt": "y"}}).map(as_text)
        ),
        "caption lines": file_door(
            "c.jsonl", records, damaged(b'{"key": "a", "prompt": "x"}\n{"key": "b"}\n')
        ),
        "recorded keys": file_door("k.json", read_actions, changed(keys).map(as_text)),
        "actions": Door(st.text("wasd-,0 9noe", max_size=12), action),
        "intrinsics": Door(st.text("0123.,-ena", max_size=16), text_of_intrinsics),
        "pictures": file_door("x.png", picture, damaged(*images)),
        "films": file_door(
            "x.mp4", clip, damaged(*(made(film, f"x.{e}") for e in ("mp4", "mkv", "ts", "avi")))
        ),
        "weights": file_door(
            "w.safetensors", tensors, damaged(save_tensors({"a": np.ones((2, 3), np.float32)}))
        ),
        "index": file_door("w.safetensors.index.json", tensors, changed(index).map(as_text)),
        "configs": Door(
            st.one_of(*(st.tuples(st.just(k), changed(v)) for k, v in named_json)), config
        ),
        "adapters": Door(
            st.dictionaries(st.sampled_from([*adapter, "x.alpha", "y"]), st.integers(0, 3)),
            lambda folder, chosen: use_adapters(folder, adapter, chosen),
        ),
        "zips": Door(
            st.fixed_dictionaries({n: st.just(c) | damaged(c) for n, c in kinds.items()}), zips
        ),
        "metrics": file_door("m.jsonl", lines, damaged(metrics)),
    }


ZIP_FILES = (("raw", "part.zip"), ("raw", "part_camera.npz"), ("latents", "part.zip"))


def use_adapters(folder: Path, tensors: dict[str, np.ndarray], chosen: dict[str, int]) -> None:
    """Writes some tensors of a LoRA file, of other sizes or transposed."""
    values = {}
    for name, how in chosen.items():
        value = tensors.get(name, np.ones(1, np.float32))
        values[name] = np.array([value, value[:1], value.T, value * 0][how], order="C")
    (folder / "x.safetensors").write_bytes(save_tensors(values))
    load_adapters(folder, ABSTRACT, TABLE)


def try_door(name: str, examples: int) -> None:
    door = doors()[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(door.values)
    def check(value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                door.use(Path(folder), value)
            except InputError as error:
                assert str(error) and "\n" not in str(error)

    check()


DOORS = (
    "text poses, array poses, camera sidecar, transforms.json, captions, caption lines, "
    "recorded keys, actions, intrinsics, pictures, films, weights, index, configs, adapters, "
    "zips, metrics"
).split(", ")


@pytest.mark.parametrize("name", DOORS)
def test_doors(name: str) -> None:
    assert sorted(DOORS) == sorted(doors())
    try_door(name, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_doors_with_many_examples(name: str) -> None:
    try_door(name, MANY)
