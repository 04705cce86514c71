"""The command line of `sample.py` and `sanawm-sample`: flags become `SampleOptions`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

from absl import app, flags

from sanawm_jax.runtime.command_line import (
    define_config,
    end_with,
    fail,
    flag_values_in,
    lasting_imports,
    parse_flags,
    show_notes,
)
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.shipped import CONFIGS, SHIPPED, SMALL_WORLD, SMALL_WORLD_REFINER
from sanawm_jax.sampling.options import KINDS, SampleOptions, make_options

flags.disclaim_key_flags()  # the flags belong to the script that calls `main`
_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


def main() -> None:
    """Runs the program with the arguments of the process."""
    argv = define_options(sys.argv)
    app.run(_run, argv=argv, flags_parser=read_options)


def define_options(
    argv: list[str], values: flags.FlagValues = flags.FLAGS, *, is_streaming: bool = False
) -> list[str]:
    """Defines the flags of a command line; see `define_config`.

    Args:
      is_streaming: the program streams, whatever the command line says.
    """
    default = "sample_small_world"
    if is_released(argv):
        is_streaming |= "streaming" in flag_values_in(argv)
        default = "sample_streaming" if is_streaming else "sample_sana_wm"
    argv = define_config(CONFIGS / f"{default}.py", "sampling defaults", argv, values)
    config = importlib.import_module(f"configs.{default}").get_config()
    for field in _fields():
        text = field.metadata["help"]
        value = config.get(field.name, field.default)
        if value not in (None, False, "", dataclasses.MISSING):
            text += f" (default: {value})"
        _DEFINE[KINDS[field.name]](field.name, None, text, flag_values=values)
    return argv


def read_options(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> SampleOptions:
    """Parses a command line; bad flags end the program with one line and exit status 2.

    Args:
      argv: the program's name and its arguments.
      values: where `define_options` has defined the flags.
    """
    parse_flags(argv, values)
    given = {field.name: values[field.name].value for field in _fields()}
    try:
        return make_options(given, consistent(given, values.config.to_dict()))
    except InputError as error:
        fail(str(error))


def _fields() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(SampleOptions) if field.metadata["is_flag"]]


def consistent(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without those values that would contradict the flags.

    Args:
      given: values of the flags; None stands for a flag that is not given.
    """
    dropped = set()
    camera = config.get("camera") if given["camera"] is None else given["camera"]
    if camera and given["action"] is None:
        dropped.add("action")  # the path replaces the configuration's keys
    if given["image"] is not None:
        dropped.add("intrinsics")  # they belong to the configuration's own image
    # the shipped refiner is only for the shipped stage 1, and only where no flag names stage 1
    if config.get("refiner_weights") == SMALL_WORLD_REFINER and (
        given["weights"] is not None or config.get("weights") != SMALL_WORLD
    ):
        dropped.add("refiner_weights")
    return {name: value for name, value in config.items() if name not in dropped}


def is_released(argv: list[str]) -> bool:
    """Whether a command line names another model than the small world.

    `--weights` decides, or `--refiner_weights` where stage 1 is not named. The answer is needed
    before the flags are parsed, because it decides which configuration they override.
    """
    named = flag_values_in(argv)
    return (named.get("weights") or named.get("refiner_weights") or SMALL_WORLD) not in SHIPPED


def _run(options: Any) -> None:
    show_notes()
    try:
        with lasting_imports():
            from sanawm_jax.runtime.compilation_cache import use_compilation_cache
            from sanawm_jax.runtime.compiler_flags import use_compiler_flags
            from sanawm_jax.sampling import command

        use_compiler_flags()
        use_compilation_cache()
        video = command.sample(options)
        print("note: python -m sanawm_jax.live walks through a world in a browser", file=sys.stderr)
        print(video)
    except InputError as error:
        fail(str(error))
    except (Exception, KeyboardInterrupt) as error:
        end_with(error)
