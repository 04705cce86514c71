"""A world of tiny random weights: chunk by chunk, kept, continued elsewhere, and branched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.media.video import Mp4Writer
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.latents import channels_first, channels_last
from sanawm_jax.sampling.open_world import open_world
from sanawm_jax.sampling.options import StreamOptions
from sanawm_jax.sampling.staggered import denoise_staggered
from sanawm_jax.sampling.streaming import FRAGMENTS, NO_DELAY, VideoThread
from sanawm_jax.sampling.world import World
from sanawm_jax.sampling.world_state import load_state, save_state
from tests.sample_tiny import sample

FRAMES = 73
CHUNKS = StreamOptions(denoising_step_list="1000,700,0")
OPTIONS: dict[str, Any] = dict(
    streaming=True,
    prompt="a room",
    action="w-24,wd-24,l-24",
    num_frames=FRAMES,
    denoising_step_list=CHUNKS.denoising_step_list,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 with a causal decoder in `w`, a refiner in `w-refiner`, and a picture."""
    folder = tmp_path_factory.mktemp("world")
    write_random(folder / "w", sizes=TINY, part="all")
    config = folder / "w/vae/config.json"
    raw = json.loads(config.read_text()) | {"decoder_causal": True}
    config.write_text(json.dumps(raw))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def run(folder: Path, out: Path, **given: Any) -> tuple[np.ndarray, np.ndarray, Path]:
    """Returns the latents, the frames and the video of a command line."""
    given = {"weights": str(folder / "w"), "image": str(folder / "image.png"), **OPTIONS, **given}
    files = {"save_latents": str(out / "l.npy"), "save_frames": str(out / "f.npy")}
    video = sample(**given, **files, output_dir=str(out))
    return np.load(out / "l.npy"), np.load(out / "f.npy"), video


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_parts_of_a_stream_equal_the_whole_clip(folder: Path, tmp_path: Path) -> None:
    """Refined and decoded as the latents arrive, or from the whole clip's latents."""
    report = tmp_path / "b.json"
    stage1, frames, video = run(folder, tmp_path, benchmark_json=str(report))
    assert stage1.shape == (1, 8, 10, 2, 2) and frames.shape == (FRAMES, 64, 64, 3)
    assert read_mp4(video).shape == frames.shape
    assert json.loads(report.read_text())["chunks"] == 3
    np.save(tmp_path / "stage1.npy", stage1)
    given = {"stage1_latents": str(tmp_path / "stage1.npy")}
    _, decoded, _ = run(folder, tmp_path, **given, streaming=False)
    assert relative(frames, decoded) < 1e-5
    for size in (1, 3, 4):  # of which the last cuts the refiner's blocks
        _, decoded, _ = run(folder, tmp_path, **given, num_frame_per_block=size)
        assert relative(frames, decoded) < 1e-5
    refiner = {"refiner_weights": str(folder / "w-refiner")}
    whole, expected, _ = run(folder, tmp_path, **given, **refiner, streaming=False)
    latents, frames, video = run(folder, tmp_path, **refiner)
    assert read_mp4(video).shape == frames.shape == expected.shape == (FRAMES - 1, 64, 64, 3)
    assert relative(latents, whole) < 1e-5 and relative(frames, expected) < 1e-5
    latents, frames, _ = run(folder, tmp_path, **given, **refiner, num_frame_per_block=2)
    assert relative(latents, whole) < 1e-5 and relative(frames, expected) < 1e-5


def test_a_longer_stream_begins_as_a_shorter_one(folder: Path, tmp_path: Path) -> None:
    shape = (1, 8, 10, 2, 2)
    noise = tmp_path / "noise.npy"
    np.save(noise, np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    np.save(tmp_path / "short.npy", np.load(noise)[:, :, :7])
    long, _, _ = run(folder, tmp_path, latents=str(noise))
    short, _, _ = run(folder, tmp_path, latents=str(tmp_path / "short.npy"), num_frames=49)
    np.testing.assert_array_equal(short, long[:, :, :7])
    seeded, _, _ = run(folder, tmp_path)
    shorter, _, _ = run(folder, tmp_path, num_frames=49)
    np.testing.assert_array_equal(shorter, seeded[:, :, :7])
    assert relative(seeded, long) > 0.1
    guided, _, _ = run(folder, tmp_path, num_frames=25, cfg_scale=3.0)
    assert relative(guided, seeded[:, :, :4]) > 1e-3


def test_chunks_of_one_frame(folder: Path, tmp_path: Path) -> None:
    """With all of them cached they are what the teacher samples if each chunk waits its turn."""
    index = folder / "w/model_index.json"
    kept = index.read_text()
    raw = json.loads(kept) | {"num_frame_per_block": 1}
    noise = np.random.default_rng(1).standard_normal((1, 8, 4, 2, 2)).astype(np.float32)
    given: dict[str, Any] = dict(latents=noise, num_frames=25, action="w-12,d-12")
    try:
        index.write_text(json.dumps(raw))
        found, frames, _ = run(folder, tmp_path, **given, num_cached_blocks=-1)
        model = SanaWM.from_pretrained(folder / "w", dtype="float32")
    finally:
        index.write_text(kept)
    assert found.shape[2] == 4 and len(frames) == 25
    request = model.request(
        str(folder / "image.png"),
        action=given["action"],
        num_frames=25,
        height=64,
        width=64,
        intrinsics="60,60,32,32",
    )
    expected = denoise_staggered(
        *model.network("transformer"),
        channels_last(noise),
        model.encode_image(request.pixels),
        model._conditions(request, "a room", "", False, 12),
        np.array(CHUNKS.sigmas, np.float32),
        (0, 1, 2, 3),
        guidance=1.0,
        dtype=np.float32,
        interval=1.0,
        progress=False,
    )
    assert relative(found, channels_first(expected)) < 1e-5


def open_one(folder: Path, **given: Any) -> World:
    model = SanaWM.from_pretrained(folder / "w", dtype="float32")
    options: dict[str, Any] = dict(
        height=64, width=64, intrinsics="60,60,32,32", text_length=12, options=CHUNKS
    )
    return open_world(model, str(folder / "image.png"), "a room", **{**options, **given})


def test_a_state_goes_on_in_another_process_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    world = open_one(folder)
    with pytest.raises(InputError, match="unknown keys"):
        world.step("q")
    first = world.step("w")
    assert first is not None and first.shape == (25, 64, 64, 3)
    kept = world.state
    file = save_state(tmp_path / "world.safetensors", kept)
    world.set_prompt("a red room")
    second = np.asarray(world.step([frozenset("wd")] * 24))
    world.restore(kept)
    assert world.prompt == "a room"
    other = np.asarray(world.step("s"))
    assert relative(other, second) > 1e-4
    for _ in range(2):  # the value outlives its use
        world.restore(kept)
        world.set_prompt("a red room")
        np.testing.assert_array_equal(np.asarray(world.step("wd")), second)
    code = f"""
import numpy as np
from tests.unit.sampling.test_world import CHUNKS, load_state, open_one
from pathlib import Path
world = open_one(Path({str(folder)!r}))
world.restore(load_state({str(file)!r}, world.template()))
world.set_prompt("a red room")
np.save({str(tmp_path / "second.npy")!r}, np.asarray(world.step("wd")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "second.npy"), second)


def test_a_state_of_another_world_is_refused(folder: Path, tmp_path: Path) -> None:
    world = open_one(folder)
    world.step("w")
    file = save_state(tmp_path / "w.safetensors", world.state)
    for given in (
        {"options": StreamOptions(num_frame_per_block=2)},
        {"height": 32},
        {"cfg_scale": 2.0},
    ):
        other = open_one(folder, **given)
        with pytest.raises(InputError, match="the state is of") as caught:
            other.restore(world.state)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="the state is of"):
            load_state(file, other.template())
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        load_state(tmp_path / "x", world.template())
    with pytest.raises(InputError, match="takes"):
        world.step(np.tile(np.eye(4), (5, 1, 1)))


def test_the_size_does_not_grow_and_nothing_is_compiled_again(folder: Path) -> None:
    world = open_one(folder)
    sizes = []
    with jax.log_compiles(False):
        for i in range(6):
            world.step("w")
            arrays = jax.tree.leaves(world.state.carried)
            sizes.append(sum(a.nbytes for a in arrays))
            if i == 1:
                from sanawm_jax.sampling.rollout import denoise_chunk

                programs = denoise_chunk._cache_size()
    assert len(set(sizes)) == 1
    assert denoise_chunk._cache_size() == programs


def test_prompts_by_chunk(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a room\na red room\na red room\n")
    varied, _, _ = run(folder, tmp_path, chunk_prompts=str(file))
    plain, _, _ = run(folder, tmp_path)
    np.testing.assert_array_equal(varied[:, :, :4], plain[:, :, :4])
    assert relative(varied[:, :, 4:], plain[:, :, 4:]) > 1e-4
    file.write_text("a room\n")
    with pytest.raises(InputError, match="3 chunks"):
        run(folder, tmp_path, chunk_prompts=str(file))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few frames": ({"action": "w-16"}, "too few"),
    "one cached chunk": ({"num_cached_blocks": 1}, "never the last one"),
    "no cached chunk": ({"num_cached_blocks": 0}, "at least 1"),
    "no end": ({"denoising_step_list": "1000,500"}, "end in 0"),
    "rising": ({"denoising_step_list": "500,700,0"}, "fall"),
    "words": ({"denoising_step_list": "high,low"}, "numbers"),
    "no chunk": ({"num_frame_per_block": 0}, "at least 1"),
    "devices": ({"offload": "block"}, "offload"),
    "noise": ({"latents": np.zeros((1, 8, 4, 2, 2), np.float32)}, "this video needs"),
    "file": ({"benchmark_json": "setup.cfg/x/b.json"}, "cannot write"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    given, words = BAD[name]
    (tmp_path / "setup.cfg").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        run(folder, tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_a_vae_that_is_not_causal(folder: Path, tmp_path: Path) -> None:
    model = SanaWM.from_pretrained(folder / "w", dtype="float32")
    object.__setattr__(model.vae_config, "decoder_causal", False)
    with pytest.raises(InputError, match="not causal"):
        open_world(model, str(folder / "image.png"), "a room", height=64, width=64)


def test_a_killed_run_leaves_a_film_of_whole_chunks(tmp_path: Path) -> None:
    """A copy of the file while it grows is what a kill leaves."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 8, 64, 64, 3), np.uint8)
    writer = Mp4Writer(tmp_path / "a.mp4", 16, options=FRAGMENTS, codec=NO_DELAY)
    for i, chunk in enumerate(frames):
        for j, frame in enumerate(chunk):
            writer.add(frame, is_key=j == 0)
        copy = tmp_path / f"{i}.mp4"
        copy.write_bytes((tmp_path / "a.mp4").read_bytes())
        if i:
            assert len(read_mp4(copy)) == 8 * i
    writer.close()
    assert len(read_mp4(tmp_path / "a.mp4")) == 24


def test_an_error_of_the_encoder_reaches_the_caller(tmp_path: Path) -> None:
    thread = VideoThread(tmp_path / "no" / "a.mp4", 16, None)
    with pytest.raises(av.error.FileNotFoundError), thread:
        for _ in range(5):
            thread.add(np.zeros((1, 64, 64, 3), np.uint8))
