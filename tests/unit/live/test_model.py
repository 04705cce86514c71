"""A session over tiny random weights: what the model-free world cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.live import files, protocol
from sanawm_jax.live.model import ModelEngine
from sanawm_jax.live.session import Session
from sanawm_jax.live.timeline import read_walk, size_of, walk_file
from sanawm_jax.sampling.options import SampleOptions
from tests.sample_tiny import DEFAULTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 with a causal decoder in `w`, a refiner in `w-refiner`, and a picture."""
    folder = tmp_path_factory.mktemp("live")
    write_random(folder / "w", sizes=TINY, part="all")
    config = folder / "w/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"decoder_causal": True}))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def engine_of(folder: Path, **more: Any) -> tuple[ModelEngine, list[str]]:
    given = SampleOptions(
        **DEFAULTS,
        weights=str(folder / "w"),
        image=str(folder / "image.png"),
        prompt="a room",
        denoising_step_list="1000,0",
        **more,
    )
    engine, stages = ModelEngine(given), []
    engine.load(stages.append)
    return engine, stages


def walk(session: Session, keys: str, chunks: int) -> str:
    """Makes chunks and returns the digest of the last one."""

    def job() -> str:
        session._set("paused")
        session.steer(protocol.Control(1, keys=frozenset(keys)))
        for _ in range(chunks):
            session._step()
        return session.node.digest

    return session.do(job).result(120)


def test_time_travel_with_a_model(folder: Path, tmp_path: Path) -> None:
    engine, stages = engine_of(folder, num_frame_per_block=1, num_cached_blocks=2)
    assert engine.device == "CPU" and any("compiling" in stage for stage in stages)
    events: list[Any] = []
    session = Session(engine, events.append, budget=1)  # keeps no more states than it must
    session.start()
    try:
        session.do(lambda: session.go(0)).result(120)
        walk(session, "w", 12)
        nodes = session.timeline.nodes[-12:]
        assert [len(node.poses) for node in nodes[:2]] == [9, 8]
        assert size_of(nodes[-1].state) > 0 and nodes[0].state is None
        # a moment whose state was dropped is computed again
        session.do(lambda: session.go(nodes[2].number)).result(120)
        assert walk(session, "w", 1) == nodes[3].digest
        assert walk(session, "d", 1) != nodes[4].digest
        # another prompt acts, and a recording with it is equal bit for bit
        session.do(lambda: session.prompt("a room at night")).result(120)
        walk(session, "d", 1)
        data = session.do(lambda: walk_file(session.timeline, session.node, 1)).result(120)
        begin, _, steps = read_walk(data)
        assert steps[-1].prompt == "a room at night" != steps[-2].prompt
        file = tmp_path / "world.safetensors"
        files.save_world(session.do(session.moment).result(120), file)
        expected = walk(session, "w", 1)
        session.do(lambda: session.replay(begin, steps)).result(120)
        played = lambda: [e for e in events if isinstance(e, protocol.Played)]  # noqa: E731
        for _ in range(1200):
            if played():
                break
            session._thread.join(0.1)
        assert (played()[-1].compared, played()[-1].equal) == (len(steps), len(steps))
        session.do(lambda: files.load_world(session, file)).result(120)
        session.do(lambda: session.go(0)).result(120)
        assert walk(session, "w", 1) == expected
        assert file.stat().st_size < files.largest_world(session)
    finally:
        session.close()
        assert session.join(60)


@pytest.mark.slow
def test_a_refiner_that_waits_for_a_block(folder: Path) -> None:
    refiner = {"refiner_weights": str(folder / "w-refiner"), "refiner_block_size": 2}
    engine, _ = engine_of(folder, num_frame_per_block=1, num_cached_blocks=2, **refiner)
    session = Session(engine, lambda event: None)
    session.start()
    try:
        session.do(lambda: session.go(0)).result(120)
        walk(session, "w", 4)
        counts = [len(node.frames) for node in session.timeline.nodes[-4:]]
        assert counts == [0, 16, 0, 16]
        walked = session.do(lambda: files.walk_of(session)).result(120)
        assert len(walked.frames) == len(walked.shown) == 32
        # the sink's frame is no part of the video
        np.testing.assert_array_equal(walked.shown, walked.poses[1:])
    finally:
        session.close()
