"""A run that fails says what to try, leaves no incomplete file, and can be continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.failures import explain
from sanawm_jax.sampling import command
from tests.sample_tiny import sample

ROOT = Path(__file__).parents[2]
# runs sample.py with a painter that fails at the third picture
# what a shell starts in the background ignores Ctrl-C, as do its children
HEAR = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
FAIL = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sanawm_jax.media.overlay import OverlayPainter
paint_all = OverlayPainter.paint_all
def broken(self, pictures):
    for i, picture in enumerate(paint_all(self, pictures)):
        if i == 2:
            {failure}
        yield picture
OverlayPainter.paint_all = broken
sys.argv[0] = "sample.py"
runpy.run_path("sample.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_random(folder / "w", sizes=TINY)
    Image.new("RGB", (64, 64), (9, 99, 199)).save(folder / "image.png")
    return folder


def arguments(folder: Path, out: Path) -> list[str]:
    flags = {
        **{"weights": folder / "w", "image": folder / "image.png", "prompt": "a", "action": "w-16"},
        **{"num_frames": 17, "height": 64, "width": 64, "step": 1, "cfg_scale": 1.0},
        **{"dtype": "float32", "text_length": 8, "intrinsics": "60,60,32,32", "output_dir": out},
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')", 1, "try --offload=model"),
    ],
    ids=["interrupt", "memory"],
)
def test_half_way(failure: str, status: int, line: str, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = FAIL.format(failure=failure)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(weights, out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "SANAWM_COMPILATION_CACHE": str(tmp_path / "cache")},
    )
    kept = out / "sample_stage1_latents.npy"
    assert done.returncode == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert line in last
    assert last.endswith(f"--stage1_latents={kept} goes on from the end of stage 1")
    assert "Traceback" not in done.stderr
    assert f"note: stage 1 is kept: --stage1_latents={kept}" in done.stderr
    assert [file.name for file in out.iterdir()] == [kept.name]  # no half of a video
    video = sample(weights=str(weights / "w"), output_dir=str(out), stage1_latents=str(kept))
    assert read_mp4(video).shape == (17, 64, 64, 3)


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", HEAR, "sample.py", "--weights=/nowhere/at/all",
         "--stage1_latents=/dev/stdin",
         "--latents_only", f"--save_latents={tmp_path / 'a.npy'}"],
        cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        time.sleep(20)  # it waits for its input
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and stderr.strip().splitlines()[-1] == "error: interrupted"


def test_what_is_explained() -> None:
    full = explain(OSError(28, "No space left on device", "out/a.mp4"))
    assert full == (
        "the disk is full at out/a.mp4; free some space, or choose another --output_dir"
    )
    assert "disk is full" in str(explain(OSError("2408448 requested and 437216 written")))
    error = MemoryError()
    error.add_note("go on")
    assert explain(error) is not None and str(explain(error)).endswith("; go on")
    assert explain(ValueError("a mistake of ours")) is None
    assert explain(OSError(2, "no such file")) is None


def test_latents_that_cannot_be_kept_end_no_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, array: np.ndarray) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_npy", full)
    given = {"weights": str(weights / "w"), "image": str(weights / "image.png")}
    given |= {"prompt": "a", "action": "w-8", "output_dir": str(tmp_path)}
    with pytest.warns(UserWarning, match="stage 1 is not kept"):
        assert sample(**given).is_file()
