"""The stream of a zip set: order, hosts, workers, resuming, replacement of bad samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.data.bad_samples import BadSampleCounter
from sanawm_jax.data.text_cache import TextCache, build_text_cache
from sanawm_jax.data.zip_index import Selection, index_zips
from sanawm_jax.data.zip_latents import ZipLatents
from sanawm_jax.data.zip_stream import ZipStream
from sanawm_jax.data.zip_writer import write_zip_latents
from sanawm_jax.runtime.errors import InputError
from tests.zip_set import SHAPE, flip_bytes, folders, make_sample, write_set


def encode(texts):
    """Encodes a caption as two tokens: its length and its last character."""
    text = np.array([[[len(t)], [ord((t or "?")[-1])]] for t in texts], np.float32)
    return np.repeat(text, 3, axis=2), np.array([[1, bool(t)] for t in texts])


def open_source(folder: Path, frames: int = 3, **options) -> ZipLatents:
    index = index_zips(folders(folder), Selection(min_latent_file_size=0), BadSampleCounter())
    source = ZipLatents(index, frames, **options)
    source.measure()
    return source


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Twelve good samples."""
    return write_set(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> Path:
    """Twelve samples, of which two are bad."""
    folder = write_set(tmp_path_factory.mktemp("partly"), zips=2)
    path = make_sample("", 22).c2w.copy()
    path[5, 0, 0] = np.nan
    samples = [make_sample(f"s2{i}", 20 + i) for i in (0, 1, 3)]
    write_zip_latents(folder, "part.2", [*samples, make_sample("s22", 22, c2w=path)])
    flip_bytes(folder / "latents" / "part.0.zip", "s03.npz")
    return folder


def stream_of(source: ZipLatents, batch: int = 4, **options) -> ZipStream:
    options = {"seed": 7, "counter": BadSampleCounter(0.5), "num_threads": 0, **options}
    return ZipStream(source, batch, **options)


def prompts(batches: dict[str, np.ndarray]) -> list[int]:
    """Returns the seeds of the samples, which their latents contain."""
    return [int(c.rpartition(" ")[2]) for c in batches["caption"].ravel()]


def test_every_epoch_is_another_whole_shuffle(whole: Path) -> None:
    source = open_source(whole)
    stream = stream_of(source)
    first, second = stream.next(3), stream.next(3)
    assert first["latents"].shape == (3, 4, *SHAPE) and first["camera"].shape == (3, 4, 3, 20)
    assert first["plucker"].shape == (3, 4, *SHAPE[:3], 48)
    seeds = sorted(10 * z + i for z in range(3) for i in range(4))
    assert sorted(prompts(first)) == sorted(prompts(second)) == seeds
    assert prompts(first) != prompts(second)
    assert prompts(stream_of(source).next(3)) == prompts(first)
    assert prompts(stream_of(source, seed=8).next(3)) != prompts(first)
    for seed, latents in zip(prompts(first), first["latents"].reshape(-1, *SHAPE), strict=True):
        np.testing.assert_array_equal(latents, make_sample("", seed).latents)
    # the published batch size of a device pair
    assert sorted(prompts(stream_of(source, 1).next(12))) == seeds
    # a repeat is part of the epoch
    repeated = prompts(stream_of(open_source(whole, repeat=3)).next(9))
    assert sorted(repeated) == sorted(3 * seeds) and sorted(repeated[:12]) != seeds


def test_hosts_read_their_own_rows(partly: Path) -> None:
    source = open_source(partly)
    together = stream_of(source).next(6)
    halves = [stream_of(source, rows=np.array(r)).next(6) for r in ([0, 2], [1, 3])]
    for name, value in together.items():
        np.testing.assert_array_equal(halves[0][name], value[:, [0, 2]])
        np.testing.assert_array_equal(halves[1][name], value[:, [1, 3]])
    # on good data an epoch's halves are disjoint and together whole
    epoch = [prompts({"caption": half["caption"][:3]}) for half in halves]
    assert len(epoch[0]) == len(epoch[1]) == 6


def test_hosts_share_an_epoch(whole: Path) -> None:
    source = open_source(whole)
    halves = [prompts(stream_of(source, rows=np.arange(2) + r).next(3)) for r in (0, 2)]
    assert not set(halves[0]) & set(halves[1])
    assert sorted(halves[0] + halves[1]) == sorted(10 * z + i for z in range(3) for i in range(4))


def test_resumes_in_the_middle_of_an_epoch(partly: Path) -> None:
    source = open_source(partly)
    stream = stream_of(source)
    stream.next(2)
    state = json.loads(json.dumps(stream.state()))
    expected = stream.next(5)
    other = stream_of(source, num_threads=2)
    other.restore(state)
    found = other.next(5)
    assert other.state() == stream.state()  # the counts too
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    other.close()


def test_worker_processes_give_the_same(partly: Path, tmp_path: Path) -> None:
    source = open_source(partly)
    source.text = build_text_cache(tmp_path, source.index.captions(), encode, fingerprint="x")
    here, there = stream_of(source), stream_of(source, num_workers=2, num_threads=1)
    here.next(1)
    there.restore(here.state())
    expected, found = here.next(7), there.next(7)
    assert here.state() == there.state() and here.state()["counts"][1] > 0
    there.close()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert expected["text"].shape == (7, 4, 2, 3) and expected["text_mask"].dtype == bool


def test_bad_samples_are_replaced_counted_and_named(partly: Path, caplog) -> None:
    counter = BadSampleCounter(0.5)
    stream = stream_of(open_source(partly), counter=counter)
    with caplog.at_level("WARNING"):
        batches = stream.next(6)  # two epochs: the two bad ones come twice, or again in place
    assert counter.bad >= 4 and counter.seen == 24 + counter.bad
    assert not {3, 22} & set(prompts(batches))
    assert "skipped sample s03 of" in caplog.text and "part.0.zip: s03.npz cannot" in caplog.text
    assert "skipped sample s22 of" in caplog.text and "row 5 holds NaN" in caplog.text


def test_too_many_bad_samples_stop_the_run(partly: Path) -> None:
    stream = stream_of(open_source(partly), counter=BadSampleCounter(0.05, 3))
    with pytest.raises(InputError, match=r"4 of 16 samples could not be read, more than data\.max"):
        stream.next(12)
    one_line = BadSampleCounter(0.0, 1)
    with pytest.raises(InputError) as caught:
        stream_of(open_source(partly), counter=one_line).next(12)
    assert "\n" not in str(caught.value)


def test_clips_that_are_too_short_stop_nothing(tmp_path: Path, caplog) -> None:
    long = make_sample("long", 1, latents=np.zeros((5, 2, 4, 5), np.float16))
    path = np.concatenate([long.c2w, np.tile(long.c2w[-1:], (16, 1, 1))])
    intrinsics = np.tile(long.intrinsics[:1], (33, 1))
    write_zip_latents(
        tmp_path,
        "x",
        [
            make_sample("long", 1, latents=long.latents, c2w=path, intrinsics=intrinsics),
            make_sample("short", 2),
        ],
    )
    counter = BadSampleCounter(0.0, 1)
    source = open_source(tmp_path, 5)
    assert set(prompts(stream_of(source, counter=counter).next(3))) == {1}
    assert counter.bad == 0 < counter.other
    assert "3 latent frames, fewer than 5" in caplog.text
    with pytest.raises(InputError, match="none of the first samples can be read"):
        open_source(tmp_path, 6)
    source.latent_frames = 6
    with pytest.raises(InputError, match="100 samples in a row cannot be used"):
        stream_of(source, counter=counter).next(1)


def test_other_data_than_the_checkpoints(whole: Path, partly: Path, caplog) -> None:
    stream = stream_of(open_source(whole))
    state = {**stream.state(), "samples": "others"}
    stream.restore(state)
    assert "not those of the checkpoint" in caplog.text
    assert stream.next(1)["latents"].shape[:2] == (1, 4)


def test_text_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sanawm_jax.data.text_cache.SAVE_EVERY", 1)
    captions = [f"c{i}" for i in range(5)]
    calls = []

    def counting(texts):
        calls.append(list(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        build_text_cache(tmp_path, captions, counting, fingerprint="x", batch_size=2)
    with pytest.raises(InputError, match="no finished cache"):
        TextCache(tmp_path)
    cache = build_text_cache(tmp_path, captions, counting, fingerprint="x", batch_size=2)
    # It continues after the saved captions; the empty caption has its own batch.
    assert calls[2:] == [["c2", "c3"], ["c4", "c4"], ["", ""]]
    assert cache.width == 3
    for caption in (*captions, ""):
        text, mask = cache(caption)
        np.testing.assert_array_equal(text, np.asarray(encode([caption])[0][0], np.float16))
        np.testing.assert_array_equal(mask, [True, caption != ""])
    build_text_cache(tmp_path, captions[::-1], counting, fingerprint="x", batch_size=2)
    assert len(calls) == 5  # nothing is left to encode
    build_text_cache(tmp_path, captions, counting, fingerprint="y", batch_size=2)
    assert len(calls) == 9
