"""One visitor's world: a thread that makes chunks, and what the visitor does with them.

The keys at the start of a chunk count for all of it. A chunk is begun as late as the time of the
last ones allows, so that it is ready when the one before has been shown: at most one chunk is ahead
of the picture, and a key acts as soon as it can. After going back, a reset or a new scene the
generation rises, and pictures of earlier generations are thrown away.

All methods but `run` may be called from any thread. They return at once; `do` gives a future.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from sanawm_jax.camera.live import Steering
from sanawm_jax.live import protocol
from sanawm_jax.live.engine import Engine, Scene
from sanawm_jax.live.path import heading_of, poses_along
from sanawm_jax.live.pictures import thumbnail, to_jpeg
from sanawm_jax.live.timeline import Control, Node, Step, Timeline, digest, on_host
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.world_state import WorldState

BUDGET = 512 << 20  # bytes of a session's timeline
IDLE = 600.0  # seconds without a control after which a session pauses by itself
_SPARE = 0.02  # seconds by which a chunk is begun earlier than the last ones took
_REMEMBERED = 6  # chunks whose time says how long the next one takes


@dataclasses.dataclass(frozen=True)
class Frames:
    """Pictures of a chunk on their way to the page.

    Attributes:
      start: `time.monotonic` at which the first one is due.
      interval: seconds from one to the next.
      pictures: header and JPEG of each.
    """

    start: float
    interval: float
    pictures: list[tuple[protocol.Picture, bytes]]


Event = protocol.ServerMessage | Frames | tuple[protocol.Picture, bytes]


class Session:
    """See the module.

    Args:
      engine: the loaded model.
      publish: takes events; it is called from the session's thread and must return at once.
      budget: bytes of the timeline.
    """

    def __init__(self, engine: Engine, publish: Callable[[Event], None], budget: int = BUDGET):
        self.engine, self._publish, self._budget = engine, publish, budget
        self._wake = threading.Condition()
        self._jobs: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]]
        self._jobs = collections.deque()
        self._control = protocol.Control(number=0)
        self._look = [0.0, 0.0]
        self._touched = time.monotonic()
        self._state, self._detail, self._ending = "loading", "opening the world", ""
        self._resumes, self._is_closed, self._is_watched = False, False, True
        self._times: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._begin_at = self._next_due = 0.0
        self._script: collections.deque[Step] = collections.deque()
        self._played = [0, 0, 0]
        self.generation, self.number = 0, 0
        self.scene = engine.scenes[0]
        self._thread = threading.Thread(target=self.run, name="session", daemon=True)

    def start(self) -> None:
        """Starts the thread, which opens the first scene."""
        self._thread.start()

    @property
    def touched(self) -> float:
        """`time.monotonic` of the last control."""
        return self._touched

    def close(self, reason: str = "") -> None:
        """Ends the thread after the chunk at hand, and gives the memory back."""
        with self._wake:
            self._is_closed, self._ending = True, reason
            self._wake.notify()

    def join(self, seconds: float) -> None:
        """Waits for the end of the thread."""
        self._thread.join(seconds)

    def watch(self, on: bool) -> None:
        """Whether somebody looks: chunks are made only then."""
        with self._wake:
            self._is_watched = on
            if not on:
                self._control = protocol.Control(number=self._control.number)
                self._look = [0.0, 0.0]
            self._wake.notify()

    def steer(self, control: protocol.Control) -> None:
        """New keys; they act from the next chunk on."""
        with self._wake:
            self._look[0] += control.look[0]
            self._look[1] += control.look[1]
            self._control, self._touched = control, time.monotonic()
            moves = bool(control.keys) or any(control.stick) or any(control.look)
            if moves and self._state == "paused" and self._resumes:
                self._jobs.append((self._go_on, concurrent.futures.Future()))
            self._wake.notify()

    def do(self, job: Callable[[], Any]) -> concurrent.futures.Future:
        """Runs a function between two chunks, on the thread that owns the world."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            if self._is_closed:
                future.set_exception(InputError("the session has ended; reload the page"))
            else:
                self._touched = time.monotonic()
                self._jobs.append((job, future))
                self._wake.notify()
        return future

    def run(self) -> None:
        """The thread."""
        try:
            self.begin(self.scene)
            while self._turn():
                pass
        except Exception as error:
            self._ending = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise
        finally:
            with self._wake:
                self._is_closed = True
                jobs, self._jobs = self._jobs, collections.deque()
            for _, future in jobs:
                if future.set_running_or_notify_cancel():
                    future.set_exception(InputError("the session has ended; reload the page"))
            self._set("ended", self._ending)
            self.__dict__.pop("world", None)
            self.__dict__.pop("timeline", None)

    def _turn(self) -> bool:
        """Does one job or makes one chunk; False at the end."""
        with self._wake:
            while True:
                if self._is_closed:
                    return False
                if self._jobs:
                    job, future = self._jobs.popleft()
                    break
                wait = None
                if self._state == "running" and self._is_watched:
                    if time.monotonic() - self._touched > IDLE and not self._script:
                        job, future = self._rest, concurrent.futures.Future()
                        break
                    wait = self._begin_at - time.monotonic()
                    if wait <= 0:
                        job = None
                        break
                self._wake.wait(wait)
        if job is None:
            self._step()
        elif future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except InputError as error:
                self._publish(protocol.Failure("refused", str(error)))
                future.set_exception(error)
        return True

    # What follows runs on the session's thread.

    def begin(self, scene: Scene) -> None:
        """A new world at a start scene."""
        with self.engine.device_lock:
            world = self.engine.open(scene)
            state = world.state
        self.scene, self.world = scene, world
        self._plant(state, scene.pixels(), {"scene": scene.name})
        self._set("running")

    def choose(self, name: str) -> None:
        """A new world at a start scene of the shelf."""
        scenes = {scene.name: scene for scene in self.engine.scenes}
        if name not in scenes:
            raise InputError("there is no such start scene; choose one of the shelf")
        self.begin(scenes[name])

    def moment(self) -> WorldState:
        """The present state on the host."""
        with self.engine.device_lock:
            return on_host(self.world.state)

    def adopt(self, state: WorldState, name: str) -> None:
        """A new timeline that begins at a saved state."""
        with self.engine.device_lock:
            self.world.restore(state)
        blank = np.zeros((self.engine.height, self.engine.width, 3), np.uint8)
        self._plant(state, blank, {"world": name})
        self._set("running")

    def _plant(self, state: WorldState, picture: np.ndarray, begin: dict[str, str]) -> None:
        self._forget_plans()
        self.timeline = Timeline(state, thumbnail(picture), begin, self._budget)
        self.node = self.timeline.nodes[0]
        self._publish(protocol.Forget(self.generation))
        self.tell(self.node)

    def _forget_plans(self) -> None:
        """Nothing that was made before counts any more."""
        self.generation += 1
        self._begin_at = self._next_due = 0.0
        self._times.clear()
        self._script.clear()
        with self._wake:
            self._look = [0.0, 0.0]

    def go(self, number: int) -> None:
        """Goes to a moment and waits there; a key walks on from it."""
        node = self.timeline.node(number)
        self._visit(node)
        if node.frames:
            picture = self._picture(node, node.poses[-1])
            self._publish(Frames(0.0, 0.0, [(picture, node.frames[-1])]))
        self._set("paused", "press a key to walk on from here", resumes=True)

    def reset(self) -> None:
        """Goes to the start and walks on."""
        self._visit(self.timeline.nodes[0])
        self._set("running")

    def _visit(self, node: Node) -> None:
        """Puts the world into the state of a node; computes it again if it was dropped."""
        self._forget_plans()
        missing = []
        source = node
        while source.state is None:
            missing.append(source)
            assert source.parent is not None  # the start keeps its state
            source = source.parent
        with self.engine.device_lock:
            self.world.restore(source.state)
            for later in reversed(missing):
                if later.prompt != self.world.prompt:
                    self.world.set_prompt(later.prompt)
                assert later.control is not None
                self.engine.read(self.world.step(later.control))
        self.node = node

    def pause(self, on: bool) -> None:
        """Stops, or goes on."""
        if on and self._state == "running":
            self._set("paused", "paused")
        elif not on and self._state == "paused":
            self._go_on()

    def _go_on(self) -> None:
        if self._state == "paused":
            self._touched = time.monotonic()
            self._begin_at = self._next_due = 0.0
            self._set("running")

    def _rest(self) -> None:
        self._set("paused", "nobody has pressed a key for a while", resumes=True)

    def prompt(self, text: str) -> None:
        """New words; they act from the next chunk on."""
        with self.engine.device_lock:
            self.world.set_prompt(text)
        self._tell_status()

    def walk_path(self, points: Sequence[Sequence[float]], move: float) -> None:
        """Walks along a path that was drawn on the map."""
        rule, count = self.engine.rule, self.world.frames_ahead
        start = self.node.poses[-1]
        later = count - (self.world.chunks == 0)  # the first chunk has the given picture too
        poses = poses_along(
            points, start, rule.translation_speed * move, math.radians(3 * rule.rotation_speed_deg)
        )
        if not self.world.chunks:
            poses = np.concatenate([start[None], poses])
        steps = []
        while len(poses):
            piece, poses = poses[:count], poses[count:]
            rest = np.tile(piece[-1:], (count - len(piece), 1, 1))
            steps.append(Step(np.concatenate([piece, rest])))
            count = later
        self._play(steps)

    def replay(self, begin: dict[str, str], steps: list[Step]) -> None:
        """Plays a recorded walk from its start."""
        scenes = {scene.name: scene for scene in [self.scene, *self.engine.scenes]}
        if begin != self.timeline.begin:
            if begin.get("scene") not in scenes:
                raise InputError("the walk begins in another world; load that world's file first")
            self.begin(scenes[begin["scene"]])
        else:
            self._visit(self.timeline.nodes[0])
        self._play(steps)

    def _play(self, steps: list[Step]) -> None:
        self._script = collections.deque(steps)
        self._played = [0, 0, 0]
        self._touched = time.monotonic()
        self._begin_at = self._next_due = 0.0
        self._set("running")

    def stop(self) -> None:
        """Ends what is played."""
        if self._script:
            self._script.clear()
            self._publish(protocol.Played(*self._played))
            self._tell_status()

    def _next_step(self) -> tuple[Step, protocol.Control]:
        with self._wake:
            control, look = self._control, self._look
            self._look = [0.0, 0.0]
        if self._script:
            return self._script.popleft(), control
        rule, frames = self.engine.rule, self.world.frames_ahead
        turn = math.radians(rule.rotation_speed_deg) * control.turn
        ahead, aside, yaw, pitch = control.stick
        spread = [math.radians(max(-360.0, min(angle, 360.0))) / frames for angle in look]
        extra = (
            ahead * rule.translation_speed * control.move,
            aside * rule.translation_speed * control.move,
            yaw * turn + spread[0],
            pitch * turn + spread[1],
        )
        return Step(Steering(control.keys, extra, control.move, control.turn)), control

    def _step(self) -> None:
        step, control = self._next_step()
        began = time.monotonic()
        with self.engine.device_lock:
            if step.prompt is not None and step.prompt != self.world.prompt:
                self.world.set_prompt(step.prompt)
            pixels = self.engine.read(self.world.step(step.control))
        poses = self.world.poses
        assert poses is not None
        poses = poses[len(poses) - len(pixels) :] if len(pixels) else poses[-1:]
        jpegs = [to_jpeg(frame) for frame in pixels]
        took = time.monotonic() - began
        self._times.append(took)
        node = self._keep(step.control, poses, jpegs, pixels)
        self._send(node, control, 1e3 * took)
        self._after(step, node)

    def _keep(
        self, control: Control, poses: np.ndarray, jpegs: list[bytes], pixels: np.ndarray
    ) -> Node:
        small = thumbnail(pixels[-1]) if len(pixels) else self.node.thumbnail
        self.node = self.timeline.add(
            self.node,
            prompt=self.world.prompt,
            control=control,
            poses=poses,
            frames=jpegs,
            digest=digest(pixels),
            thumbnail=small,
            state=None,
        )
        return self.node

    def _send(self, node: Node, control: protocol.Control, model_ms: float) -> None:
        """Says when the pictures are due, and when the next chunk begins."""
        usual, now = max(self._times), time.monotonic()
        interval = 1 / self.engine.fps
        if node.frames:
            # a model that is slower than the video plays it evenly at its own rate
            interval = max(interval, median(self._times) / len(node.frames))
        start = max(now, self._next_due)
        self._next_due = start + len(node.frames) * interval
        self._begin_at = self._next_due - usual - _SPARE
        pictures = []
        for pose, jpeg in zip(node.poses, node.frames, strict=False):
            self.number += 1
            picture = self._picture(node, pose)
            picture = dataclasses.replace(
                picture, input=control.number, input_ms=control.at, model_ms=model_ms
            )
            pictures.append((picture, jpeg))
        self._publish(Frames(start, interval, pictures))

    def _after(self, step: Step, node: Node) -> None:
        """What can wait until the pictures are on their way."""
        with self.engine.device_lock:
            state = on_host(self.world.state)
        self.timeline.keep_state(node, state)
        self.tell(node)
        ahead = round(max(0.0, self._next_due - time.monotonic()) * self.engine.fps)
        kept = self.timeline.kept / 2**20
        self._publish(
            protocol.Stats(ahead, 1e3 * self._times[-1], len(node.frames), 0, round(kept, 1))
        )
        if step.digest or self._script or self._played[0]:
            self._played[0] += 1
            if step.digest:
                self._played[1] += 1
                self._played[2] += step.digest == node.digest
            if not self._script:
                self._publish(protocol.Played(*self._played))
                self._played = [0, 0, 0]
            self._tell_status()

    def _picture(self, node: Node, pose: np.ndarray) -> protocol.Picture:
        x, z = pose[[0, 2], 3]
        return protocol.Picture(
            protocol.FRAME,
            self.generation,
            self.number,
            node.number,
            x=float(x),
            z=float(z),
            heading=heading_of(pose),
        )

    def tell(self, node: Node) -> None:
        """Sends a node of the timeline and its thumbnail."""
        control = node.control
        keys = "".join(sorted(control.keys)) if isinstance(control, Steering) else ""
        path = [[*map(float, pose[[0, 2], 3]), heading_of(pose)] for pose in node.poses]
        parent = node.parent.number if node.parent else 0
        self._publish(
            protocol.Chunk(
                node.number, parent, node.branch, node.depth, node.prompt, keys, path[-1:]
            )
        )
        picture = protocol.Picture(protocol.THUMBNAIL, self.generation, 0, node.number)
        self._publish((picture, node.thumbnail))

    def tell_all(self) -> None:
        """Sends everything to a page that has just come, or come back."""
        self._publish(protocol.Forget(self.generation))
        for node in self.timeline.nodes:
            self.tell(node)
        if self.node.frames:
            picture = self._picture(self.node, self.node.poses[-1])
            self._publish(Frames(0.0, 0.0, [(picture, self.node.frames[-1])]))
        self._tell_status()

    def _set(self, state: str, detail: str = "", *, resumes: bool = False) -> None:
        with self._wake:
            self._state, self._detail, self._resumes = state, detail, resumes
        self._tell_status()

    def _tell_status(self) -> None:
        node = getattr(self, "node", None)
        world = getattr(self, "world", None)
        self._publish(
            protocol.Status(
                self._state,
                self._detail,
                generation=self.generation,
                node=node.number if node else 0,
                prompt=world.prompt if world else "",
                scene=self.scene.name,
                playing=len(self._script),
            )
        )
