"""A session over a world without a model: keys, time, recordings, memory."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.camera.live import Steering
from sanawm_jax.live import files, protocol
from sanawm_jax.live.model_free import ModelFreeEngine, draw
from sanawm_jax.live.pace import Pace
from sanawm_jax.live.path import pieces, poses_along
from sanawm_jax.live.pictures import from_jpeg, to_jpeg
from sanawm_jax.live.session import Frames, Session, steering
from sanawm_jax.live.timeline import read_walk, walk_file
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError

SIZE = 48


class Visitor:
    """A session and the events that its page would get."""

    def __init__(self, budget: int = 1 << 28):
        self.engine = ModelFreeEngine(SIZE, SIZE)
        self.engine.fps = 400.0  # so that nothing waits for the time of a video
        self.events: list[Any] = []
        self.session = Session(self.engine, self.events.append, budget)
        self.session.start()

    def do(self, job: Any) -> Any:
        return self.session.do(job).result(10)

    def hold(self, keys: str, **more: Any) -> None:
        self.session.steer(protocol.Control(1, keys=frozenset(keys), **more))

    def walk(self, keys: str, chunks: int, **more: Any) -> None:
        """Makes exactly so many chunks, and pauses."""
        session = self.session

        def job() -> None:
            session._set("paused")
            session.steer(protocol.Control(1, keys=frozenset(keys), **more))
            for _ in range(chunks):
                session._step()

        self.do(job)

    def pause(self) -> None:
        self.do(lambda: self.session.pause(True))

    def pixels(self) -> np.ndarray:
        return from_jpeg(self.session.node.frames[-1])

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, condition: Any) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, self.events[-3:]
            time.sleep(0.005)


@pytest.fixture
def visitor() -> Iterator[Visitor]:
    found = Visitor()
    yield found
    found.session.close()
    assert found.session.join(10)


def test_chunks_follow_the_keys(visitor: Visitor) -> None:
    visitor.pause()
    visitor.do(visitor.session.reset)
    visitor.wait(lambda: len(visitor.of(Frames)) > 2)
    visitor.walk("w", 2)
    node = visitor.session.node
    assert node.control == Steering(frozenset("w")) and len(node.poses) == len(node.frames) == 8
    sky = visitor.session.world.sky()
    np.testing.assert_allclose(visitor.pixels(), draw(node.poses[-1], SIZE, SIZE, sky), atol=70)
    assert node.poses[-1][2, 3] > node.poses[0][2, 3]
    numbers = [p.number for frames in visitor.of(Frames) for p, _ in frames.pictures]
    assert numbers == sorted(set(numbers))
    last = visitor.of(Frames)[-1].pictures[0][0]
    assert (last.input, last.node) == (1, node.number)


def test_going_back_makes_a_branch(visitor: Visitor) -> None:
    visitor.walk("w", 4)
    trunk = visitor.session.node
    target = trunk.parent.parent
    visitor.do(lambda: visitor.session.go(target.number))
    status = visitor.of(protocol.Status)[-1]
    assert (status.state, status.node) == ("paused", target.number)
    generation = visitor.session.generation
    visitor.hold("d")  # a key walks on
    visitor.wait(lambda: visitor.session.node.number > trunk.number)
    visitor.pause()
    branch = next(n for n in visitor.session.timeline.nodes if n.number == trunk.number + 1)
    assert branch.parent is target and branch.branch != trunk.branch
    assert visitor.session.generation == generation
    # the same keys from the same moment give the same pixels
    visitor.do(lambda: visitor.session.go(target.number))
    visitor.walk("w", 2)
    assert visitor.session.node.digest == trunk.digest
    with pytest.raises(InputError, match="no moment 99999"):
        visitor.do(lambda: visitor.session.go(99999))


def test_a_pause_by_hand_stays(visitor: Visitor) -> None:
    visitor.pause()
    count = visitor.do(lambda: len(visitor.session.timeline.nodes))
    visitor.hold("w")
    time.sleep(0.1)
    assert visitor.do(lambda: len(visitor.session.timeline.nodes)) == count
    visitor.session.act(protocol.Pause(False))
    visitor.wait(lambda: len(visitor.session.timeline.nodes) > count)
    visitor.session.watch(False)  # the page has gone: no chunk is made
    time.sleep(0.1)
    count = visitor.do(lambda: len(visitor.session.timeline.nodes))
    time.sleep(0.1)
    assert visitor.do(lambda: len(visitor.session.timeline.nodes)) == count


def test_a_full_timeline_still_reaches_every_moment() -> None:
    visitor = Visitor(budget=40_000)
    state = {"size": 0}
    timeline_size = "sanawm_jax.live.timeline.size_of"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timeline_size, lambda s: 5000 if s is not None else 0)
            visitor.walk("wd", 40)
            nodes = visitor.session.timeline.nodes
            state["size"] = visitor.session.timeline.kept
            kept = [node.depth for node in nodes if node.state is not None]
            assert len(kept) < 20 and kept[0] == 0 and kept[-1] == nodes[-1].depth
            assert sum(node.bytes() for node in nodes[1:]) == state["size"]
            last = nodes[-1]
            for node in nodes[1:-9:7]:
                visitor.do(lambda node=node: visitor.session.go(node.number))
                visitor.walk("wd", 1)
                expected = nodes[node.number + 1].digest
                assert visitor.session.node.digest == expected
            assert last.digest != nodes[1].digest
    finally:
        visitor.session.close()


def test_a_recording_is_played_bit_for_bit(visitor: Visitor) -> None:
    visitor.do(visitor.session.reset)
    visitor.pause()
    visitor.do(lambda: visitor.session.go(0))
    visitor.walk("w", 3)
    visitor.do(lambda: visitor.session.prompt("a red evening"))
    visitor.walk("d", 1, stick=(0.3, 0, 0, 0.2), look=(5.0, 0.0), move=2.0)
    session = visitor.session
    data = visitor.do(lambda: walk_file(session.timeline, session.node, 7))
    end = session.node.digest
    begin, seed, steps = read_walk(data)
    assert seed == 7 and begin == {"scene": "day"} and len(steps) == 4
    assert isinstance(steps[-1].control, Steering) and steps[-1].control.extra[2] > 0
    visitor.do(lambda: session.begin(session.engine.scenes[1]))  # elsewhere
    visitor.do(lambda: session.replay(begin, steps))
    visitor.wait(lambda: visitor.of(protocol.Played))
    assert dataclasses.astuple(visitor.of(protocol.Played)[-1]) == (4, 4, 4)
    assert any(node.digest == end for node in session.timeline.nodes)
    changed = json.loads(data)
    changed["chunks"][1]["keys"] = "s"
    visitor.do(lambda: session.replay(*read_walk(json.dumps(changed).encode())[::2]))
    visitor.wait(lambda: len(visitor.of(protocol.Played)) > 1)
    assert visitor.of(protocol.Played)[-1].equal == 1
    with pytest.raises(InputError, match="another world"):
        visitor.do(lambda: session.replay({"world": "other"}, steps))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind": "sanawm_jax walk"}',
        b'{"kind": "sanawm_jax walk", "begin": {}, "seed": 1, "chunks": []}',
        b'{"kind": "sanawm_jax walk", "begin": {}, "seed": 1, "chunks": [{}]}',
        b'{"kind": "sanawm_jax walk", "begin": {}, "seed": 1, "chunks": '
        b'[{"keys": "w", "extra": [1e999, 0, 0, 0], "prompt": "a", "digest": ""}]}',
        b'{"kind": "sanawm_jax walk", "begin": {}, "seed": 1, "chunks": '
        b'[{"poses": [[1]], "prompt": "a", "digest": ""}]}',
        b'{"kind": "sanawm_jax walk", "begin": [], "seed": 1, "chunks": [1]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_recording_is_refused(damage: bytes) -> None:
    with pytest.raises(InputError):
        read_walk(damage)


def test_a_world_is_saved_and_loaded(visitor: Visitor, tmp_path: Path) -> None:
    visitor.walk("w", 3)
    file = tmp_path / "w.safetensors"
    visitor.do(lambda: files.save_world(visitor.session.moment(), file))
    visitor.walk("d", 2)
    end = visitor.session.node.digest
    visitor.do(visitor.session.reset)
    visitor.do(lambda: files.load_world(visitor.session, file))
    visitor.pause()
    visitor.do(lambda: visitor.session.go(0))
    visitor.walk("d", 2)
    assert visitor.session.node.digest == end
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="saved world"):
        visitor.do(lambda: files.load_world(visitor.session, file))


def test_what_is_taken_away(visitor: Visitor, tmp_path: Path) -> None:
    visitor.pause()
    visitor.do(lambda: visitor.session.go(0))
    with pytest.raises(InputError, match="nothing was walked"):
        visitor.do(lambda: files.walk_of(visitor.session))
    visitor.walk("w", 2)
    visitor.walk("d", 1)
    walk = visitor.do(lambda: files.walk_of(visitor.session))
    action = files.action_string(walk)
    assert action == "w-16,d-8" and walk.is_exact
    np.testing.assert_allclose(walk.poses, actions_to_c2w(action), atol=1e-6)
    (tmp_path / "p.npy").write_bytes(files.npy(walk.poses))
    assert np.load(tmp_path / "p.npy").shape == (25, 4, 4)
    for overlay in (False, True):
        files.video(walk, tmp_path / "v.mp4", 16.0, overlay=overlay)
        frames = read_mp4(tmp_path / "v.mp4")
        assert frames.shape == (25, SIZE, SIZE, 3)


def test_a_drawn_path(visitor: Visitor) -> None:
    visitor.do(lambda: visitor.session.go(0))
    visitor.do(lambda: visitor.session.walk_path([(0.0, 0.5), (0.4, 0.5)], 2.0))
    visitor.wait(lambda: visitor.of(protocol.Played))
    assert visitor.of(protocol.Played)[-1].chunks >= 2
    node = next(
        n for n in visitor.session.timeline.nodes[::-1] if isinstance(n.control, np.ndarray)
    )
    np.testing.assert_allclose(node.poses[-1][[0, 2], 3], (0.4, 0.5), atol=1e-6)
    with pytest.raises(InputError, match="no length"):
        visitor.do(lambda: visitor.session.walk_path([(0.4, 0.5), (0.4, 0.5)], 1.0))


def test_poses_along_a_line() -> None:
    poses = poses_along([(0, 1), (1, 1)], np.eye(4), 0.05, np.radians(6))
    np.testing.assert_allclose(poses[-1][:3, 3], (1, 0, 1), atol=1e-9)
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert steps.max() < 0.0501
    np.testing.assert_allclose(poses[-1][:3, 2], (1, 0, 0), atol=1e-6)  # looks along +x at the end
    turns = np.arccos(np.clip((poses[1:, :3, 2] * poses[:-1, :3, 2]).sum(1), -1, 1))
    assert turns.max() < np.radians(6.01)
    cut = pieces(poses, 9, 8)
    assert [len(piece) for piece in cut[:2]] == [9, 8] and len(cut[-1]) == 8
    np.testing.assert_array_equal(np.concatenate(cut)[: len(poses)], poses)
    with pytest.raises(InputError, match="draw one of"):
        poses_along([(0, 9000)], np.eye(4), 0.05, 0.1)


def test_pace_shows_at_the_rate_and_begins_late() -> None:
    pace = Pace(16.0)
    start, interval = pace.add(10.0, 0.2, 8)
    assert (start, interval) == (10.0, 1 / 16)
    assert pace.free_at == 10.5 and pace.begin_at == pytest.approx(10.28)
    start, _ = pace.add(10.45, 0.2, 8)
    assert start == 10.5 and pace.ahead(10.5) == 8
    slow = Pace(16.0)
    for now in (10.0, 11.0, 12.0):
        start, interval = slow.add(now, 1.0, 8)
        assert (start, interval) == (now, 0.125) and slow.begin_at < now + 0.01
        assert slow.ahead(now) == 8


def test_sticks_and_the_mouse_steer() -> None:
    rule = ModelFreeEngine().rule
    control = protocol.Control(1, keys=frozenset("w"), stick=(1, 0, -1, 0), move=2.0)
    found = steering(control, (16.0, -8.0), rule, 8)
    assert found.keys == frozenset("w") and found.move == 2.0
    step, turn = rule.translation_speed, np.radians(rule.rotation_speed_deg)
    np.testing.assert_allclose(found.extra, (2 * step, 0, np.radians(2) - turn, np.radians(-1)))


def test_jpegs() -> None:
    frame = ModelFreeEngine(32, 48).scenes[0].pixels()
    assert np.abs(from_jpeg(to_jpeg(frame)).astype(int) - frame).mean() < 4
