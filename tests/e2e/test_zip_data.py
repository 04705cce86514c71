"""The encoder of a user's videos and cameras, and a training run on its zip latents."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from sanawm_jax.camera.intrinsics import default_intrinsics
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.checkpoints.files import published_fields
from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.core.params import apply
from sanawm_jax.data.bad_samples import BadSampleCounter
from sanawm_jax.data.encode import encode_videos, main, make_parser
from sanawm_jax.data.latent_cache import to_signed
from sanawm_jax.data.zip_index import Selection, index_zips
from sanawm_jax.data.zip_latents import ZipLatents
from sanawm_jax.media.image import resize_and_center_crop
from sanawm_jax.media.video import write_mp4
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.loop import train
from sanawm_jax.training.recipes.dry_run import describe
from sanawm_jax.training.recipes.registry import make_recipe
from sanawm_jax.training.recipes.stage1_zip import first_samples
from tests.e2e.tiny_config import get_config
from tests.zip_set import flip_bytes, folders, random_path

ROOT = Path(__file__).parents[2]
FRAMES, SIZE = 9, 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stage-1 folder."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_random(folder, layout="diffusers", part="stage1", sizes=TINY, seed=0)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes videos/ (a.mp4, b.mp4, c/ of images), poses/ in three layouts, and captions.json."""
    folder = tmp_path_factory.mktemp("own")
    for part in ("videos/c", "poses"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (FRAMES + 2, 6, 8, 3), dtype=np.uint8)
    frames = base.repeat(16, 1).repeat(16, 2)  # 96 x 128
    write_mp4(folder / "videos" / "a.mp4", frames, 16)
    write_mp4(folder / "videos" / "b.mp4", frames[::-1], 16)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "videos" / "c" / f"{number}.png")
    c2w = random_path(rng, FRAMES + 2)
    np.savez(
        folder / "poses" / "a.npz", c2w=c2w, intrinsics=[100.0, 90, 60, 50], width=128, height=96
    )
    np.savetxt(folder / "poses" / "b.txt", c2w[:, :3].reshape(-1, 12))
    np.save(folder / "poses" / "c.npy", c2w)
    (folder / "captions.json").write_text(json.dumps({"a": "one", "b": {"prompt": "two"}, "c": ""}))
    return folder


def flags_of(own: Path, folder: Path, out: Path, **over: object) -> list[str]:
    flags = {
        "videos": own / "videos",
        "poses": own / "poses",
        "captions": own / "captions.json",
        "weights": folder,
        "out": out,
        "num_frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "dtype": "float32",
        "clips_per_zip": 2,
        **over,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def encoded(videos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the encoder for these videos."""
    out = tmp_path_factory.mktemp("encoded")
    main(flags_of(videos, weights, out))
    return out


def open_set(folder: Path) -> ZipLatents:
    selection = Selection(min_latent_file_size=0)
    return ZipLatents(index_zips(folders(folder), selection, BadSampleCounter()), 2)


def test_round_trip(videos: Path, weights: Path, encoded: Path) -> None:
    source = open_set(encoded)
    assert [item.key for item in source.index.items] == ["a", "b", "c"]
    assert sorted(f.name for f in (encoded / "raw").glob("*.zip")) == [
        "clips_00000.zip",
        "clips_00001.zip",
    ]
    assert not (encoded / ".encoded").exists()
    _, graphdef, params = Stage1Folder(weights).load_encoder(np.float32)
    encode = jax.jit(lambda p, video: apply(graphdef, p, video, method="encode_normalised"))
    c2w = np.load(videos / "poses" / "c.npy")[:FRAMES]
    frames = [Image.open(videos / "videos" / "c" / f"{n}.png") for n in range(FRAMES)]
    for number, (key, caption, given) in enumerate(
        [("a", "one", [100, 90, 60, 50]), ("b", "two", None), ("c", "", None)]
    ):
        row = source[number]
        assert row["caption"] == caption
        pictures = frames
        if key != "c":
            pictures = [Image.fromarray(f) for f in read_mp4(videos / "videos" / f"{key}.mp4")]
        crops = [resize_and_center_crop(p, SIZE, SIZE)[0] for p in pictures[:FRAMES]]
        pixels = to_signed(np.stack([np.asarray(p) for p in crops])[None])
        latents = encode(params, pixels)[0]
        np.testing.assert_allclose(row["latents"], latents, atol=2e-2)  # float16 on disk
        # 96 rows become 64 and 128 columns 85, of which 10 go on the left
        fx, fy, cx, cy = default_intrinsics(128, 96) if given is None else given
        x, y = 85 / 128, 64 / 96
        intrinsics = np.tile([fx * x, fy * y, cx * x - 10, cy * y], (FRAMES, 1))
        camera, plucker = camera_conditions(c2w, intrinsics.astype(np.float32), SIZE, SIZE, 8, 32)
        np.testing.assert_allclose(row["camera"], camera, atol=1e-5)
        np.testing.assert_allclose(row["plucker"], plucker, atol=1e-5)


def test_goes_on_and_adds(
    videos: Path, weights: Path, encoded: Path, tmp_path, monkeypatch
) -> None:
    stamps = {f: f.stat().st_mtime_ns for f in encoded.rglob("*.zip")}
    options = make_parser().parse_args(flags_of(videos, weights, encoded))
    encode_videos(options)
    assert {f: f.stat().st_mtime_ns for f in encoded.rglob("*.zip")} == stamps

    # killed while the second clip is read: the first is not encoded again
    read: list[str] = []
    load = sys.modules["sanawm_jax.data.encode"].load_clip

    def load_clip(video, *where):
        read.append(video.key)
        if len(read) == 2:
            raise KeyboardInterrupt
        return load(video, *where)

    monkeypatch.setattr("sanawm_jax.data.encode.load_clip", load_clip)
    with pytest.raises(SystemExit) as caught:
        main(flags_of(videos, weights, tmp_path))
    assert caught.value.code == 130 and not list(tmp_path.rglob("*.zip"))
    main(flags_of(videos, weights, tmp_path))
    assert read == ["a", "b", "b", "c"]
    for file in stamps:
        again = tmp_path / file.relative_to(encoded)
        assert again.is_file()
    np.testing.assert_array_equal(open_set(tmp_path)[1]["latents"], open_set(encoded)[1]["latents"])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"poses": "absent"}, "neither a file nor a folder"),
        ({"videos": "absent"}, "is no folder"),
        ({"num_frames": 17}, "has 11 frames, too few for 17; give --num_frames 9 or less"),
        ({"num_frames": 8}, "must be a multiple of 8 and one"),
        ({"frame_step": 2}, "has 11 frames, too few for 9; give --num_frames 1 or less"),
        ({"captions": "CAPTIONS"}, "has no caption of b, c"),
        ({"poses": "ONE"}, "is the camera of one video and there are 3"),
        ({"poses": "SOME"}, "has no camera of video b"),
        ({"poses": "LONG"}, "has 11 frames and its camera 12 poses"),
        ({"weights": "nowhere"}, "neither a folder nor a hub name"),
        ({"width": 100}, "multiples of 32"),
    ],
)
def test_bad_input_is_one_line(
    over: dict, message: str, videos: Path, weights: Path, tmp_path: Path, capsys
) -> None:
    c2w = np.load(videos / "poses" / "c.npy")
    (tmp_path / "SOME").mkdir()
    np.save(tmp_path / "SOME" / "a.npy", c2w)
    (tmp_path / "LONG").mkdir()
    for key in "abc":
        np.save(tmp_path / "LONG" / f"{key}.npy", np.concatenate([c2w, c2w[-1:]]))
    np.save(tmp_path / "ONE", c2w)
    (tmp_path / "ONE.npy").rename(tmp_path / "ONE")
    (tmp_path / "CAPTIONS").write_text('{"a": "x"}')
    (tmp_path / "CAPTIONS").rename(tmp_path / "CAPTIONS.json")
    names = {"CAPTIONS": "CAPTIONS.json"}
    over = {k: tmp_path / names.get(v, v) if str(v).isupper() else v for k, v in over.items()}
    with pytest.raises(SystemExit) as caught:
        main(flags_of(videos, weights, tmp_path / "out", **over))
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert not list((tmp_path / "out").rglob("*.zip"))


def test_other_settings_need_another_folder(videos: Path, weights: Path, encoded: Path) -> None:
    options = make_parser().parse_args(flags_of(videos, weights, encoded, height=32))
    with pytest.raises(InputError, match="holds clips of --height 64; use another --out"):
        encode_videos(options)


def config_of(encoded: Path, weights: Path) -> ConfigDict:
    config = get_config("zip")
    config.data_dir = str(encoded)
    config.data.text_dir = str(weights)
    return config


def results(workdir: Path) -> tuple[list[float], list[bytes]]:
    """Losses, and the exported weights."""
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    files = sorted((workdir / "export" / "transformer").glob("*.safetensors"))
    return [json.loads(row)["loss"] for row in rows], [file.read_bytes() for file in files]


def test_training_on_them_resumes_bit_equal(encoded: Path, weights: Path, tmp_path: Path) -> None:
    """The second half of a run with a worker process equals that half without one."""
    done = subprocess.run(
        [
            *(sys.executable, "train.py", "--config=tests/e2e/tiny_config.py:zip"),
            *(f"--workdir={tmp_path / 'whole'}", f"--config.data_dir={encoded}"),
            *(f"--config.data.text_dir={weights}", "--config.data.num_workers=1"),
            *("--config.samples.every=2", "--config.samples.steps=2"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # the precision of conftest.py: it shares this process' compiled programs
        env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'whole'}/export"
    films = {str(f.relative_to(tmp_path / "whole")) for f in tmp_path.rglob("clip_*.mp4")}
    assert films == {f"samples/{step}/clip_{i}.mp4" for step in (2, 4) for i in (0, 1)}
    config = config_of(encoded, weights)
    assert "2 clips of 2 x 2 x 2 latents" in describe(config)
    # A run that ended after its first half continues without a worker process.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "export")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
    train(config, tmp_path / "parts")
    losses, files = results(tmp_path / "whole")
    assert len(losses) == 4 and np.isfinite(losses).all() and files
    assert results(tmp_path / "parts") == (losses, files)


def test_adapters_are_trained_on_them_too(encoded: Path, weights: Path, tmp_path: Path) -> None:
    """The resident data hold the base model; the export has adapters and merged weights."""
    config = config_of(encoded, weights)
    config.dit = ConfigDict(published_fields(TINY.dit), convert_dict=False)
    config.init_weights = str(weights)
    config.lora.rank = 2
    recipe = make_recipe(config, tmp_path)
    assert "base" in recipe.resident and recipe.flops > 0
    recipe.export(recipe.init(None))
    names = ("lora/adapter_config.json", "transformer/config.json")
    assert all((tmp_path / "export" / name).is_file() for name in names)


def test_films_show_the_first_samples_that_can_be_read(encoded: Path, tmp_path: Path) -> None:
    whole = open_set(encoded)
    shutil.copytree(encoded, tmp_path / "set")
    flip_bytes(tmp_path / "set" / "latents" / "clips_00000.zip", "a.npz")
    rows = first_samples(open_set(tmp_path / "set"), 3)
    assert list(rows["caption"]) == ["two", ""]  # of b and c
    np.testing.assert_array_equal(rows["latents"][0], whole[1]["latents"])
    indexed = open_set(tmp_path / "set")
    for file in (tmp_path / "set" / "latents").glob("*.zip"):
        file.unlink()
    with pytest.raises(InputError, match="none of the first samples can be shown"):
        first_samples(indexed, 3)


def test_a_run_on_too_many_bad_samples_ends_with_one_line(
    encoded: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path / "set")
    flip_bytes(tmp_path / "set" / "latents" / "clips_00000.zip", "b.npz")
    config = config_of(tmp_path / "set", weights)
    config.data.update(min_bad=2, max_bad_fraction=0.01, text_cache=str(tmp_path / "text"))
    config.batch_size = 6  # an epoch: every sample twice
    with pytest.raises(InputError, match=r"2 of 11 samples could not be read"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data_dir", "", "needs data_dir"),
        ("data_dir", "nowhere", "there is no folder nowhere/raw"),
        ("data.latent_dir", "a,b", "names 1 folders and data.latent_dir 2"),
        ("data.format", "lmdb", "use npy or zip_latents"),
        ("data.text_dir", "", "no text encoder"),
        ("data.num_frames", 17, "2 latent frames, fewer than 3"),
        ("data.min_latent_file_size", 10**7, "3 have latents below"),
        ("dit.in_channels", 4, "latents of data_dir has 8 channels and dit.in_channels is 4"),
    ],
)
def test_bad_configurations(
    field: str, value: object, message: str, encoded: Path, weights: Path, tmp_path: Path
) -> None:
    config = config_of(encoded, weights)
    config.data.text_cache = str(encoded / "text")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        train(config, tmp_path)
