"""The page in a real browser, over a world that is drawn without a model."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.live.model_free import ModelFreeEngine, draw
from sanawm_jax.live.timeline import read_walk
from sanawm_jax.media.video_reader import read_mp4
from tests.live_server import Running, serving

SIZE = 128
PIXELS = """() => {
  const canvas = document.getElementById("view");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.height, canvas.width, Array.from(data)];
}"""


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(ModelFreeEngine(SIZE, SIZE)) as found:
        yield found


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    """An open page with pictures; it fails if the page reports an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    found = context.new_page()
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    found.goto(running.url)
    wait_for_state(found, "running")
    found.wait_for_function("Number(document.body.dataset.frame) > 3")
    yield found
    context.close()
    assert not errors


def wait_for_state(page: Any, state: str) -> None:
    page.wait_for_function(f"document.body.dataset.state === '{state}'", timeout=20_000)


def frame(page: Any) -> int:
    return int(page.evaluate("document.body.dataset.frame"))


def pixels(page: Any) -> np.ndarray:
    height, width, data = page.evaluate(PIXELS)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def walk(page: Any, key: str, chunks: int = 3) -> None:
    """Holds a key until so many more chunks are in the timeline, and pauses."""
    count = page.locator("#timeline button").count()
    page.keyboard.down(key)
    page.wait_for_function(
        f"document.querySelectorAll('#timeline button').length >= {count + chunks}"
    )
    page.keyboard.up(key)


def pause(page: Any, running: Running) -> np.ndarray:
    """Pauses, and waits for the last picture; returns its pose."""
    page.keyboard.press("p")
    wait_for_state(page, "paused")
    session = running.session()
    page.wait_for_function(f"Number(document.body.dataset.frame) >= {session.number}")
    return session.node.poses[-1]


def difference(page: Any, pose: np.ndarray, sky: tuple[int, ...] = (96, 152, 220)) -> float:
    truth = draw(pose, SIZE, SIZE, sky)
    return float(np.abs(pixels(page).astype(int) - truth).mean())


def test_pixels_move_as_the_drawing_says(page: Any, running: Running) -> None:
    start = pixels(page)
    walk(page, "w", 4)
    pose = pause(page, running)
    assert pose[2, 3] > 0.3 and abs(pose[0, 3]) < 1e-6
    assert difference(page, pose) < 4 < difference(page, np.eye(4))
    assert np.abs(pixels(page).astype(int) - start).mean() > 4
    assert page.locator("#caps .lit").count() == 0
    assert page.locator("#hud-key").inner_text().endswith("ms")


def test_the_words_change_the_world(page: Any, running: Running) -> None:
    page.fill("#prompt", "a green sky")
    page.keyboard.press("w")  # a letter of the text and no key of the world
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id === 'view'")
    running.session().do(lambda: None).result(10)
    assert running.session().world.prompt == "a green skyw"
    walk(page, "w", 2)
    pose = pause(page, running)
    assert difference(page, pose) > 10
    assert difference(page, pose, running.session().world.sky()) < 4


def test_going_back_and_branching(page: Any, running: Running) -> None:
    walk(page, "w", 4)
    pause(page, running)
    nodes = running.session().timeline.nodes
    target = nodes[-1].parent.parent
    page.click(f'#timeline button[data-node="{target.number}"]')
    page.wait_for_function(
        f"document.querySelector('[aria-selected=true]').dataset.node === '{target.number}'"
    )
    page.wait_for_function("document.getElementById('notice-text').textContent.includes('walk on')")
    session = running.session()
    page.wait_for_function(f"Number(document.body.dataset.frame) >= {session.number}")
    assert difference(page, target.poses[-1]) < 4
    walk(page, "d", 2)
    branch = next(node for node in nodes if node.branch != target.branch)
    assert branch.parent is target
    page.keyboard.press("z")
    wait_for_state(page, "paused")
    assert page.locator("#timeline .fork").count() == 1


def test_a_world_is_saved_and_loaded(page: Any, running: Running, tmp_path: Path) -> None:
    walk(page, "w", 3)
    pose = pause(page, running)
    with page.expect_download() as download:
        page.click("#save-world")
    file = tmp_path / "world.safetensors"
    download.value.save_as(file)
    page.click("#reset")
    wait_for_state(page, "running")
    page.set_input_files("#load-world", file)
    page.wait_for_function("document.querySelectorAll('#timeline button').length < 3")
    root = running.session().timeline.nodes[0]
    np.testing.assert_allclose(root.poses[-1], pose)
    assert frame(page)


def test_a_recording_is_saved_and_played(page: Any, running: Running, tmp_path: Path) -> None:
    walk(page, "w", 2)
    pause(page, running)
    with page.expect_download() as download:
        page.click("#save-walk")
    file = tmp_path / "walk.json"
    download.value.save_as(file)
    chunks = len(read_walk(file.read_bytes())[2])
    page.set_input_files("#play-walk", file)
    page.wait_for_function("document.getElementById('toast').textContent.includes('bit')")
    text = page.inner_text("#toast")
    assert f"{chunks} of {chunks} are equal bit for bit" in text
    pause(page, running)
    for button, name in (
        ("#save-poses", "p.npy"),
        ("#save-actions", "a.txt"),
        ("#save-video", "v.mp4"),
    ):
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / name)
    poses = np.load(tmp_path / "p.npy")
    action = (tmp_path / "a.txt").read_text()
    np.testing.assert_allclose(poses, actions_to_c2w(action), atol=1e-5)
    assert len(read_mp4(tmp_path / "v.mp4")) == len(poses)


def test_a_reload_in_the_middle(page: Any, running: Running) -> None:
    walk(page, "w", 2)
    number = frame(page)
    count = page.locator("#timeline button").count()
    page.reload()
    wait_for_state(page, "running")
    page.wait_for_function(f"Number(document.body.dataset.frame) > {number}")
    assert page.locator("#timeline button").count() >= count
    assert len(running.lobby.seats) == 1


def test_two_visitors(page: Any, running: Running, browser: Any) -> None:
    other = browser.new_context()
    second = other.new_page()
    second.goto(running.url)
    wait_for_state(second, "waiting")
    assert "number 1 in the line" in second.inner_text("#notice")
    running.session().close("enough")
    wait_for_state(second, "running")
    second.wait_for_function("Number(document.body.dataset.frame) > 0")
    wait_for_state(page, "ended")
    assert "enough" in page.inner_text("#notice")
    other.close()


def test_a_path_is_drawn_and_walked(page: Any, running: Running) -> None:
    page.keyboard.press("p")
    wait_for_state(page, "paused")
    page.click("#draw")
    box = page.locator("#map").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(1, 9):
        page.mouse.move(x + 5 * i, y - 8 * i)
    page.mouse.up()
    page.click("#walk-path")
    page.wait_for_function("document.getElementById('toast').textContent.includes('Walked')")
    assert running.session().node.poses[-1][2, 3] > 0.1 < running.session().node.poses[-1][0, 3]


def test_a_telephone(browser: Any, running: Running) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(running.url)
    wait_for_state(page, "running")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#stick-move").bounding_box()
    assert box and box["y"] + box["height"] < 780
    touch = context.new_cdp_session(page)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 20}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    end = time.monotonic() + 10
    while running.session().node.poses[-1][2, 3] < 0.1:
        assert time.monotonic() < end
        page.wait_for_timeout(50)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    context.close()


def test_it_can_be_used_without_a_mouse_and_in_the_dark(page: Any) -> None:
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas")].filter(
             (e) => e.checkVisibility() && !e.ariaLabel && !e.textContent.trim()
             && !e.labels?.length).map((e) => e.outerHTML)"""
    )
    assert names == []
    page.keyboard.press("h")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    picture = Image.open(io.BytesIO(page.screenshot()))
    assert picture.getpixel((600, 20))[0] < 60  # the page's head is dark
    page.focus("#timeline")
    page.keyboard.press("ArrowLeft")
    wait_for_state(page, "paused")
