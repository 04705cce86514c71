"""One visitor's world: a thread that makes chunks, and what the visitor does with them.

The keys at the start of a chunk count for all of it. A chunk is begun as late as the time of the
last ones allows, so that it is ready when the one before has been shown: at most one chunk is ahead
of the picture, and a key acts as soon as it can. After going back, a reset or a new scene the
generation rises, and pictures of earlier generations are thrown away.

`watch`, `steer` and `act` may be called from any thread, and return at once.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sanawm_jax.camera.live import Steering
from sanawm_jax.camera.mapping import ActionMapping
from sanawm_jax.live import protocol
from sanawm_jax.live.engine import Engine, Scene
from sanawm_jax.live.pace import Pace
from sanawm_jax.live.path import pieces, place_of, poses_along
from sanawm_jax.live.pictures import thumbnail, to_jpeg
from sanawm_jax.live.timeline import Node, Step, Timeline, about, digest, on_host, shown_poses
from sanawm_jax.live.worker import Worker
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.world_state import WorldState

BUDGET = 512 << 20  # bytes of a session's timeline
_HALF = 180.0  # degrees that the mouse can turn the camera in a chunk
_CORNER = 3  # times the speed of a turning key, on a drawn path
IDLE = 600.0  # seconds without a control after which a session pauses by itself


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


class Session(Worker):
    """See the module.

    Args:
      engine: the loaded model.
      publish: takes events; it is called from the session's thread and must return at once.
      budget: bytes of the timeline.
    """

    def __init__(self, engine: Engine, publish: Callable[[Event], None], budget: int = BUDGET):
        super().__init__("session")
        self.engine, self._publish, self._budget = engine, publish, budget
        self._control = protocol.Control(number=0)
        self._look = [0.0, 0.0]
        self._touched = time.monotonic()
        self._state, self._detail = "loading", "opening the world"
        self._resumes, self._is_watched = False, True
        self._pace = Pace(engine.fps)
        self._script: collections.deque[Step] = collections.deque()
        self._played = [0, 0, 0]
        self.generation, self.number = 0, 0
        self.scene = engine.scenes[0]

    @property
    def touched(self) -> float:
        """`time.monotonic` of the last control."""
        return self._touched

    def watch(self, on: bool) -> None:
        """Whether somebody looks: chunks are made only then."""
        with self._wake:
            self._is_watched = on
            self._control = protocol.Control(number=0)
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
                self.do(self._go_on)

    def act(self, message: protocol.PageMessage) -> concurrent.futures.Future | None:
        """Does what a page asks for; what is refused comes back as an event."""
        if isinstance(message, protocol.Control):
            self.steer(message)
            return None
        jobs: dict[type, Callable[[Any], None]] = {
            protocol.Pause: lambda m: self.pause(m.on),
            protocol.Prompt: lambda m: self.prompt(m.text),
            protocol.Go: lambda m: self.go(m.node),
            protocol.Reset: lambda m: self.reset(),
            protocol.Scene: lambda m: self.choose(m.name),
            protocol.Path: lambda m: self.walk_path(m.points, m.move),
            protocol.Stop: lambda m: self.stop(),
        }
        job = jobs[type(message)]
        self._touched = time.monotonic()
        return self.do(lambda: job(message))

    # What follows runs on the session's thread.

    def _open(self) -> None:
        self.begin(self.scene)

    def _step_at(self) -> float | None:
        if self._state != "running" or not self._is_watched:
            return None
        if time.monotonic() - self._touched > IDLE and not self._script:
            self.do(self._rest)
            return 0.0
        return self._pace.begin_at

    def _refused(self, error: InputError) -> None:
        self._publish(protocol.Failure("refused", str(error)))

    def _end(self, reason: str) -> None:
        self._set("ended", reason)
        self.__dict__.pop("world", None)
        self.__dict__.pop("timeline", None)
        self.__dict__.pop("node", None)

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
        self._pace.restart()
        self._script.clear()
        with self._wake:
            self._look = [0.0, 0.0]

    def go(self, number: int) -> None:
        """Goes to a moment and waits there; a key walks on from it."""
        node = self.timeline.node(number)
        self._visit(node)
        self._show(node)
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
            self._pace.restart()
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
        rule, count, start = self.engine.rule, self.world.frames_ahead, self.node.poses[-1]
        turn = math.radians(_CORNER * rule.rotation_speed_deg)
        poses = poses_along(points, start, rule.translation_speed * move, turn)
        is_start = not self.world.chunks  # the first chunk has the given picture too
        if is_start:
            poses = np.concatenate([start[None], poses])
        self._play([Step(piece) for piece in pieces(poses, count, count - is_start)])

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
        self._pace.restart()
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
        return Step(steering(control, look, self.engine.rule, self.world.frames_ahead)), control

    def _step(self) -> None:
        step, control = self._next_step()
        began, is_start = time.monotonic(), not self.world.chunks
        with self.engine.device_lock:
            if step.prompt is not None and step.prompt != self.world.prompt:
                self.world.set_prompt(step.prompt)
            pixels = self.engine.read(self.world.step(step.control))
        poses = self.world.poses
        assert poses is not None
        unseen = poses[self.engine.dropped * is_start :]
        shown, late = shown_poses(self.node.late, unseen, len(pixels))
        jpegs = [to_jpeg(frame) for frame in pixels]
        took = time.monotonic() - began
        self.node = self.timeline.add(
            self.node,
            prompt=self.world.prompt,
            control=step.control,
            poses=poses,
            shown=shown,
            late=late,
            frames=jpegs,
            digest=digest(pixels),
            thumbnail=thumbnail(pixels[-1]) if len(pixels) else self.node.thumbnail,
            state=None,
        )
        self._send(self.node, control, took)
        self._after(step, took)

    def _send(self, node: Node, control: protocol.Control, took: float) -> None:
        """Hands the pictures over, with the time at which each is due."""
        start, interval = self._pace.add(time.monotonic(), took, len(node.frames))
        acted = dict(input=control.number, input_ms=control.at, model_ms=1e3 * took)
        pictures = [
            (dataclasses.replace(self._picture(node, pose), **acted), jpeg)
            for pose, jpeg in zip(node.shown, node.frames, strict=True)
        ]
        self._publish(Frames(start, interval, pictures))

    def _after(self, step: Step, took: float) -> None:
        """What can wait until the pictures are on their way."""
        node = self.node
        self.timeline.keep_state(node, self.moment())
        self.tell(node)
        ahead, kept = self._pace.ahead(time.monotonic()), round(self.timeline.kept / 2**20, 1)
        self._publish(protocol.Stats(ahead, 1e3 * took, len(node.frames), 0, kept))
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
        self.number += 1
        x, z, heading = place_of(pose)
        return protocol.Picture(
            protocol.FRAME, self.generation, self.number, node.number, x=x, z=z, heading=heading
        )

    def tell(self, node: Node) -> None:
        """Sends a node of the timeline and its thumbnail."""
        self._publish(about(node))
        picture = protocol.Picture(protocol.THUMBNAIL, self.generation, 0, node.number)
        self._publish((picture, node.thumbnail))

    def tell_all(self) -> None:
        """Sends everything to a page that has just come, or come back."""
        self._publish(protocol.Forget(self.generation))
        for node in self.timeline.nodes:
            self.tell(node)
        self._show(self.node)
        self._tell_status()

    def _show(self, node: Node) -> None:
        """Sends the last picture of a node."""
        if node.frames:
            picture = self._picture(node, node.shown[-1])
            self._publish(Frames(0.0, 0.0, [(picture, node.frames[-1])]))

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


def steering(
    control: protocol.Control, look: Sequence[float], rule: ActionMapping, frames: int
) -> Steering:
    """What a control means in every frame of a chunk.

    Args:
      control: the newest one.
      look: degrees to the right and upwards that the mouse turned since the last chunk.
      rule: what the keys do; a stick at its end is a key.
      frames: of the chunk, over which the mouse's turn is spread.
    """
    step = rule.translation_speed * control.move
    turn = math.radians(rule.rotation_speed_deg) * control.turn
    ahead, aside, yaw, pitch = control.stick
    right, up = (math.radians(max(-_HALF, min(angle, _HALF))) / frames for angle in look)
    extra = (ahead * step, aside * step, yaw * turn + right, pitch * turn + up)
    return Steering(control.keys, extra, control.move, control.turn)
