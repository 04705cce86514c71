"""Video files: round trips, streaming, and no remains of a failed run."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.media.video import check_writable, to_uint8, write_gif, write_mp4
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError

av = pytest.importorskip("av")


def film(frames: int = 10, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth moving gradients with a pure red, green and blue patch."""
    i, y, x = np.mgrid[:frames, :height, :width]
    video = np.stack([2 * x + 3 * i, 4 * y, x + y + 5 * i], axis=-1).astype(np.uint8)
    for c in range(3):
        video[:, :16, 16 * c : 16 * (c + 1)] = 250 * np.eye(3, dtype=np.uint8)[c]
    return video


def test_round_trip_keeps_count_size_colours_and_rate(tmp_path):
    video = film()
    path = write_mp4(tmp_path / "a.mp4", video, fps=16)
    assert path == tmp_path / "a.mp4"
    found = read_mp4(path)
    assert found.dtype == np.uint8
    assert found.shape == video.shape
    # The middle of each patch, away from the halved colour resolution at its edges.
    for c in range(3):
        patch = np.s_[:, 6:10, 16 * c + 6 : 16 * c + 10]
        assert np.abs(found[patch].astype(int) - video[patch]).max() <= 6
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert stream.frames == 10
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1
        assert [frame.time for frame in container.decode(video=0)] == [i / 16 for i in range(10)]


def test_the_index_comes_first(tmp_path):
    data = write_mp4(tmp_path / "a.mp4", film(), 16).read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize(("fps", "rate"), [(29.97, 29.97), (24000 / 1001, 24000 / 1001), (1, 1)])
def test_fractional_rates(tmp_path, fps, rate):
    with av.open(str(write_mp4(tmp_path / "a.mp4", film(4), fps))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (33, 17), (1, 1)])
def test_odd_sizes_are_padded_with_the_edge(tmp_path, height, width):
    video = film(3, 48, 64)[:, :height, :width]
    found = read_mp4(write_mp4(tmp_path / "a.mp4", video, 16, crf=1)).astype(int)
    assert found.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(found[:, -1, -1] - video[:, -1, -1]).max() <= 12


def test_a_stream_of_frames_and_chunks_equals_the_array(tmp_path):
    video = film(9)
    taken = []

    def stream():
        for item in (video[0], video[1:5], video[5], video[6:]):
            taken.append(item)
            yield item

    # lossless: what comes back then does not depend on how the encoder's threads share the work
    streamed = write_mp4(tmp_path / "b.mp4", stream(), 16, crf=0)
    whole = write_mp4(tmp_path / "a.mp4", video, 16, crf=0)
    assert len(taken) == 4
    np.testing.assert_array_equal(read_mp4(streamed), read_mp4(whole))


def test_better_quality_is_closer(tmp_path, rng):
    video = rng.integers(0, 256, size=(4, 48, 64, 3), dtype=np.uint8)
    error = [
        np.abs(read_mp4(write_mp4(tmp_path / "a.mp4", video, 16, crf)).astype(int) - video).mean()
        for crf in (5, 40)
    ]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize(("write", "suffix"), [(write_mp4, "mp4"), (write_gif, "gif")])
def test_a_failed_run_leaves_the_folder_as_it_was(tmp_path, write, suffix):
    def broken():
        # More frames than the encoder looks ahead, so that bytes have reached the disk.
        yield from film(90)
        raise RuntimeError("decoder died")

    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"the film of an earlier run")
    with pytest.raises(RuntimeError, match="decoder died"):
        write(path, broken(), 16)
    assert path.read_bytes() == b"the film of an earlier run"
    path.unlink()
    with pytest.raises(RuntimeError):
        write(path, broken(), 16)
    assert not list(tmp_path.iterdir())


def test_the_file_appears_only_when_complete(tmp_path):
    def watched():
        for frame in film(90):
            assert not (tmp_path / "a.mp4").exists()
            yield frame

    write_mp4(tmp_path / "a.mp4", watched(), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("write", [write_mp4, write_gif])
@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "no frames"),
        (film(2).astype(np.float32), "must be uint8"),
        (film(2)[..., :1], "must be uint8"),
        (film(2)[0, 0][None], "must be uint8"),
        ([film(1)[0], film(1, 32, 32)[0]], "follows frames"),
    ],
)
def test_bad_frames(tmp_path, write, frames, says):
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "a.mp4", frames, 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_bad_rates(tmp_path, fps):
    for write in (write_mp4, write_gif):
        with pytest.raises(InputError, match="fps"):
            write(tmp_path / "a.mp4", film(2), fps)
    with pytest.raises(InputError, match="50 or less"):
        write_gif(tmp_path / "a.gif", film(2), 60)


def test_bad_names_and_quality(tmp_path):
    with pytest.raises(InputError, match=r"end in \.mp4"):
        write_mp4(tmp_path / "a.avi", film(2), 16)
    for crf in (-1, 52):
        with pytest.raises(InputError, match="crf"):
            write_mp4(tmp_path / "a.mp4", film(2), 16, crf)


def test_unreadable_films(tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    for name in ("text.mp4", "absent.mp4"):
        with pytest.raises(InputError, match="cannot read"):
            read_mp4(tmp_path / name)


def test_gif_plays_at_the_right_speed_for_ever(tmp_path):
    video = film(16)
    with Image.open(write_gif(tmp_path / "a.gif", video, 16)) as gif:
        assert gif.n_frames == 16
        assert gif.info["loop"] == 0
        durations, errors = [], []
        for i in range(16):
            gif.seek(i)
            durations.append(gif.info["duration"])
            errors.append(np.abs(np.asarray(gif.convert("RGB")).astype(int) - video[i]).mean())
    assert sum(durations) == 1000
    assert set(durations) == {60, 70}
    assert max(errors) < 10


def test_to_uint8_cuts_off_and_clips():
    frames = np.array([[-0.5, 0, 0.5, 0.999, 1, 1.5]], dtype=np.float32)
    np.testing.assert_array_equal(to_uint8(frames), [[0, 0, 127, 254, 255, 255]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_uint8_inverts_division_by_255(dtype):
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    np.testing.assert_array_equal(to_uint8((every / 255).astype(dtype)), every)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_to_uint8_refuses_broken_numbers(value):
    frames = np.zeros((3, 2, 2, 3), dtype=np.float32)
    frames[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match="frame 2 holds"):
        to_uint8(frames)


def test_check_writable_creates_and_leaves_nothing_else(tmp_path):
    folder = check_writable(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())
    check_writable(str(folder))


def test_check_writable_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "under", "/proc/no/such"):
        with pytest.raises(InputError, match="cannot write"):
            check_writable(bad)
