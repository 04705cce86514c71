"""Bad input gives one clear line, before anything is compiled; the command exits with 2."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, Tensors
from sanawm_jax.runtime.command_line import show_notes
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.request import make_request
from tests.sample_tiny import sample

ROOT = Path(__file__).parents[2]
PICTURE = Image.new("RGB", (64, 48), (200, 30, 30))
GOOD: dict[str, Any] = dict(
    action="w-16", intrinsics="60,60,32,24", num_frames=17, height=64, width=64
)


def poses(frames: int = 17) -> np.ndarray:
    return np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))


def skewed() -> np.ndarray:
    c2w = poses()
    c2w[3, 0, 1] = 0.1
    return c2w


def mirrored() -> np.ndarray:
    c2w = poses()
    c2w[2, 0, 0] = -1
    return c2w


def bad_row() -> np.ndarray:
    c2w = poses()
    c2w[1, 3, 0] = 0.5
    return c2w


def infinite() -> np.ndarray:
    c2w = poses()
    c2w[5, 0, 3] = np.inf
    return c2w


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "both": (dict(camera=poses()), "exactly one"),
    "neither": (dict(action=None), "exactly one"),
    "camera_shape": (dict(action=None, camera=np.eye(4, dtype=np.float32)), "4, 4"),
    "camera_infinite": (dict(action=None, camera=infinite()), "infinity"),
    "camera_skewed": (dict(action=None, camera=skewed()), "3"),
    "camera_mirrored": (dict(action=None, camera=mirrored()), "2"),
    "camera_last_row": (dict(action=None, camera=bad_row()), "1"),
    "unknown_key": (dict(action="wz-16"), "z"),
    "zero_count": (dict(action="w-0"), "w-0"),
    "negative_count": (dict(action="w--3"), "w--3"),
    "empty_segment": (dict(action="w-8,,d-8"), "segment"),
    "empty_action": (dict(action="  "), "empty"),
    "unknown_mapping": (dict(action_mapping="qwerty"), "qwerty"),
    "intrinsics_shape": (dict(intrinsics=np.ones((3, 5), np.float32)), "shape"),
    "intrinsics_focal": (dict(intrinsics="0,60,32,24"), "positive"),
    "intrinsics_text": (dict(intrinsics="60,60,x,24"), "fx,fy,cx,cy"),
    "too_few_frames": (dict(action="w-2"), "too few"),
    "no_frames": (dict(num_frames=0), "too few"),
    "height": (dict(height=70), "multiple of 32"),
    "width": (dict(width=0), "multiple of 32"),
}


@pytest.mark.parametrize("name", CASES)
def test_request(name: str) -> None:
    overrides, words = CASES[name]
    with pytest.raises(InputError, match=words) as caught:
        make_request(PICTURE, **{**GOOD, **overrides})
    assert "\n" not in str(caught.value)


def test_the_good_request_is_good() -> None:
    assert make_request(PICTURE, **GOOD).num_frames == 17


def test_unreadable_image(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"image\.png"):
        make_request(str(file), **GOOD)


def test_frames_are_snapped_with_a_word() -> None:
    with pytest.warns(UserWarning, match="17 frames, not 20"):
        assert (
            make_request(PICTURE, **{**GOOD, "action": "w-19", "num_frames": 20}).num_frames == 17
        )


ABSTRACT = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}
WEIGHTS = {"a.weight": np.ones((3, 2), np.float32), "a.bias": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": WEIGHTS["a.weight"]}, r"missing 1: a\.bias"),
        ({**WEIGHTS, "b": np.ones(1)}, "unexpected 1: b"),
        ({**WEIGHTS, "a.bias": np.ones(4)}, r"mis-shaped 1: a\.bias \(4,\) instead of \(3,\)"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(InputError, match=words):
        keymap.load(keymap.table(ABSTRACT), ABSTRACT, Tensors(tensors), what="x")


def test_weight_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(InputError, match="does not exist"):
        SafetensorsFolder(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="pickle"):
        SafetensorsFolder(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    assert set(SafetensorsFolder(tmp_path).keys()) == set(WEIGHTS)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": "nowhere/at/all"}, "neither a folder nor a hub name"),
        ({"weights": ".", "latents_only": True}, "--save_latents"),
        ({"weights": ".", "overlay": "none"}, "--overlay=none; use one of keys, upstream"),
        ({"weights": ".", "output_dir": "setup.cfg/x"}, r"setup\.cfg"),
        # what only the end of a run would see
        ({"weights": ".", "fps": 0.0}, "fps=0"),
        ({"weights": ".", "fps": float("nan")}, "fps=nan"),
        ({"weights": ".", "fps": 1e-9}, "fps=1e-09"),
        ({"weights": ".", "name": "a" * 240}, "its name is too long"),
        ({"weights": ".", "save_latents": "."}, "it is a folder"),
        ({"weights": ".", "save_frames": "setup.cfg/a.npy"}, r"cannot write setup\.cfg/a\.npy"),
        ({"weights": ".", "save_frames": "a.npy", "save_latents": "./a.npy"}, "two files of this"),
    ],
)
def test_the_command(
    given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.cfg").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        sample(**given)
    assert "\n" not in str(caught.value)


def test_the_command_exits_with_2() -> None:
    exits_with_2("sample.py", ["--weights", "nowhere/at/all"], "neither a folder nor a hub name")


def exits_with_2(script: str, arguments: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], done.stderr


@pytest.mark.parametrize(
    ("script", "argument", "words"),
    [
        ("sample.py", "--no_such_flag=1", "no_such_flag"),
        ("train.py", "stray", "unexpected argument 'stray'"),
        ("train.py", "--config.no_such_field=1", "no field 'no_such_field'"),
    ],
)
def test_bad_flags(script: str, argument: str, words: str) -> None:
    """Both scripts; `unit/sampling/test_cli.py` has the other cases."""
    exits_with_2(script, ["--workdir=x", argument] if script == "train.py" else [argument], words)


def test_training_needs_a_folder() -> None:
    exits_with_2("train.py", [], "--workdir")


def test_notes_are_one_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: others.append(message))
    show_notes()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        make_request(PICTURE, **{**GOOD, "intrinsics": None})
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: no intrinsics given: taking a horizontal field of view of 70")
    assert [str(message) for message in others] == ["of a library"]


def test_another_working_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), "--weights=nowhere/at/all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "hub name" in done.stderr, done.stderr


def test_the_package_needs_no_torch() -> None:
    """Importing and the commands' help work without the reference."""
    block = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "import runpy\n"
        "import sanawm_jax.sampling.generate, sanawm_jax.sampling.command\n"
        "sys.argv = ['sample.py', '--weights', 'nowhere/at/all']\n"
        "runpy.run_path('sample.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "hub name" in done.stderr, done.stderr
