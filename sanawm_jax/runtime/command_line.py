"""Shared parts of the command lines: flags, notes, and one line for bad input."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sanawm_jax.runtime.failures import INTERRUPTED, device_problem, explain
from sanawm_jax.runtime.shipped import use_shipped_configs, with_config_path

flags.disclaim_key_flags()  # flags that are defined here belong to the script that calls


def fail(message: str) -> NoReturn:
    """Prints one line and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def end_with(error: BaseException) -> NoReturn:
    """Ends the program after a failure: with one line if `explain` knows it, else by raising it."""
    problem = device_problem(error)
    if problem is not None:
        fail(problem)
    line = explain(error)
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    sys.exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Excludes the objects of the modules that are imported inside from garbage collection.

    JAX and Flax make more than 100,000 objects, which the collector would scan again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_standard_streams() -> None:
    """Opens what a service manager has closed of input, output and error, as an empty file.

    Otherwise the next file that is opened gets the number of the error stream, and messages of C++
    libraries would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def define_config(
    default: Path, text: str, argv: list[str], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Defines `--config FILE` and, for every field of that file, `--config.field=value`.

    Args:
      default: the file that is used without the flag.
      text: the help text of the flag.
      argv: the command line. `--config` takes a path, or the name of a file in `configs/`.
      values: where the flags are defined.

    Returns:
      The command line, in which the name of a file is replaced by its path.
    """
    open_standard_streams()
    use_shipped_configs()
    argv = with_config_path(argv)
    try:
        config_flags.DEFINE_config_file(
            "config", str(default), text, flag_values=values, sys_argv=argv, lock_config=True
        )
    except (AttributeError, KeyError) as error:  # a field to override does not exist
        name = str(error).strip("\"'")
        fail(f"the configuration has no field {name!r}; --config.FIELD=VALUE takes existing ones")
    return argv


def flag_values_in(argv: list[str]) -> dict[str, str]:
    """Returns the flags of an unparsed command line and their values as text."""
    found = {}
    for i, word in enumerate(argv):
        flag, is_assigned, value = word.partition("=")
        if flag.startswith("-"):
            found[flag.lstrip("-")] = value if is_assigned else "".join(argv[i + 1 : i + 2])
    return found


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the command line and loads the configuration. It is a `flags_parser` for absl."""
    try:
        rest = values(argv)
        if "config" in values:
            dict(values.config)  # raises if the file does not exist
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # of a configuration that fails, the last line says why
        fail(f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0])
    # A configuration is a program, so it can raise any exception.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        fail(f"cannot load the configuration of --config: {reason}")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are --name value or --name=value")
    return rest


def show_notes() -> None:
    """Prints warnings of this package as lines that begin with `note:`, from this call on."""
    # JAX reports every kind of accelerator that it does not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    show = warnings.showwarning

    def show_note(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if category is UserWarning:
            print(f"note: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *where, **options)

    warnings.showwarning = show_note


def show_progress() -> None:
    """Shows the log from level INFO on, without the errors that Orbax also raises as exceptions."""
    absl_logging.set_verbosity(absl_logging.INFO)

    def is_shown(record: logging.LogRecord) -> bool:
        # Orbax logs a hundred lines per checkpoint, and a traceback for every exception it raises.
        is_orbax = "orbax" in record.pathname or record.name == "asyncio"
        return not is_orbax or (record.levelno >= logging.WARNING and not record.exc_info)

    handler = absl_logging.get_absl_handler()
    handler.addFilter(is_shown)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
