"""How a command line and a configuration become `SampleOptions`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.cli import define_options, is_released, read_options
from sanawm_jax.sampling.options import KINDS, SampleOptions, make_options

ROOT = Path(__file__).parents[3]
SMALL, REFINER = "small_world", "small_world_refiner"


def read(*words: str) -> SampleOptions:
    values = flags.FlagValues()
    return read_options(define_options(["sample.py", *words], values), values)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (SMALL, REFINER)),
        (["--stage1_latents=x.npy"], (SMALL, REFINER)),
        (["--refiner_weights", REFINER], (SMALL, REFINER)),
        (["--refiner_weights", ""], (SMALL, None)),
        # who names stage 1 also names stage 2
        (["--weights", SMALL], (SMALL, None)),
        (["--weights", SMALL, "--refiner_weights", "mine"], (SMALL, "mine")),
        (["--weights", "other"], ("other", None)),
        (["--config=configs/sample_small_world.py", "--weights", "other"], ("other", None)),
        (["--config.weights=other"], ("other", None)),
        (["--weights", "other", "--refiner_weights", REFINER], ("other", REFINER)),
    ],
)
def test_refiner(
    words: list[str], expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = read(*words)
    assert (options.weights, options.refiner_weights) == expected


def test_the_configuration_decides_and_flags_override_it() -> None:
    options = read()
    assert (options.num_frames, options.fps, options.dtype) == (49, 16.0, "float32")
    assert type(options.fps) is float and options.flow_shift == 0.0
    assert options.action == "w-16,wl-16,l-16" and options.intrinsics
    options = read("--num_frames", "17", "--config.step=3", "--seed=5", "--no_refiner")
    assert (options.num_frames, options.step, options.seed) == (17, 3, 5)
    assert options.no_refiner and not options.latents_only
    assert (options.output_dir, options.name, options.vae_tiling) == ("outputs", "sample", "auto")
    released = read("--weights", "owner/model")
    assert (released.num_frames, released.step, released.cfg_scale) == (161, 60, 5.0)
    assert released.refine.refiner_kv_max_frames == 11


def test_what_contradicts_the_flags_is_dropped() -> None:
    assert read("--camera=path.npy").action is None
    assert read("--camera=path.npy", "--action=w-8").action == "w-8"
    assert read("--image=room.png").intrinsics is None
    assert read("--image=room.png", "--intrinsics=1,1,2,2").intrinsics == "1,1,2,2"


@pytest.mark.parametrize("words", [["--config", "sample_sana_wm"], ["--config=sample_sana_wm"]])
def test_a_configuration_by_its_name(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(*words).num_frames == 161
    assert read(*words, "--prompt", "sample_sana_wm").prompt == "sample_sana_wm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_such_flag=1"], "no_such_flag"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config=nowhere.py"], "No such file or directory: 'nowhere.py'"),
        (["--config=setup.cfg"], "configuration"),
        (["--config.no_such_field=1"], "no field 'no_such_field'"),
        (["--config.seed=many"], "many"),
        (["--num_frames=many"], "many"),
    ],
)
def test_bad_flags(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        read(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_option_without_a_value() -> None:
    config = read_config()
    del config["height"]
    with pytest.raises(InputError, match="height has no value; give --height"):
        make_options({}, config)
    with pytest.raises(InputError, match="--sink_size=0 must be at least 1"):
        _ = make_options({"sink_size": 0}, read_config()).refine  # checked only where it is used


def read_config() -> dict[str, Any]:
    from configs.sample_small_world import get_config

    return get_config().to_dict()


def test_every_option_has_a_type_and_a_text() -> None:
    fields = dataclasses.fields(SampleOptions)
    assert {KINDS[field.name] for field in fields} == {str, int, float, bool}
    assert all(field.metadata["help"] for field in fields)
    # the configurations name options, and nothing else
    assert read_config().keys() <= {field.name for field in fields}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--action", "w-40"], False),
        (["--weights", "small_world"], False),
        (["--weights=small_world"], False),
        (["--weights", "folder"], True),
        (["-weights=owner/model"], True),
        (["--refiner_weights=folder"], True),
        (["--refiner_weights="], False),
        (["--refiner_weights", "small_world_refiner"], False),
        (["--weights=small_world", "--refiner_weights=folder"], False),
        (["--refiner_weights=small_world_refiner", "--weights=folder"], True),
        (["--prompt", "weights"], False),
        (["--weights"], False),
    ],
)
def test_is_released(words: list[str], expected: bool) -> None:
    assert is_released(["sample.py", *words]) == expected
