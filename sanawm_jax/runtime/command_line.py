"""What `sample.py` and `train.py` share: flags, notes, and one clear line on bad input."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from sanawm_jax.runtime.shipped import SHIPPED

flags.disclaim_key_flags()  # flags defined here belong to the script that asks for them


def fail(message: str) -> NoReturn:
    """Prints one line and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports inside are no garbage: the collector looks at them neither now nor later.

    JAX and Flax are more than 100,000 objects, which it would scan again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def define_config(default: Path, text: str) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config FILE` and, for every field of that file, `--config.field=value`.

    Args:
      default: the file that is taken without the flag.
      text: what the help says.
    """
    try:
        return config_flags.DEFINE_config_file("config", str(default), text, lock_config=True)
    except (AttributeError, KeyError) as error:  # overrides are looked up right here
        name = str(error).strip("\"'")
        fail(f"the configuration has no field {name!r}; --config.FIELD=VALUE takes existing ones")


def is_released(argv: list[str]) -> bool:
    """Whether a command line names a model other than the small world.

    That is stage 1's, and the refiner's where stage 1 is not named. Looked up before the flags are
    parsed: it decides which configuration they override.
    """
    named = {"weights": "", "refiner_weights": ""}
    for i, word in enumerate(argv):
        flag, is_assigned, value = word.partition("=")
        name = flag.lstrip("-")
        if name in named and flag.startswith("-"):
            named[name] = value if is_assigned else "".join(argv[i + 1 : i + 2])
    decides = named["weights"] or named["refiner_weights"]
    return decides not in ("", *SHIPPED)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line and loads the configuration; a `flags_parser` of absl."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            dict(flags.FLAGS.config)  # a file that is absent raises here
    except flags.Error as error:
        fail(str(error).splitlines()[0])
    # a configuration is a program and can raise anything
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        fail(f"cannot load the configuration of --config: {reason}")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are --name value or --name=value")
    return rest


def show_notes() -> None:
    """From here on this package's warnings are lines that begin with `note:`."""
    # jax reports every kind of accelerator that is not there
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    show = warnings.showwarning

    def show_note(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if category is UserWarning:
            print(f"note: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *where, **options)

    warnings.showwarning = show_note


def show_progress() -> None:
    """The log from INFO on, a line an entry; of Orbax only what it does not raise anyway."""
    absl_logging.set_verbosity(absl_logging.INFO)

    def is_shown(record: logging.LogRecord) -> bool:
        # a hundred lines a checkpoint, and tracebacks of errors that reach us as exceptions
        is_orbax = "orbax" in record.pathname or record.name == "asyncio"
        return not is_orbax or (record.levelno >= logging.WARNING and not record.exc_info)

    absl_logging.get_absl_handler().addFilter(is_shown)
