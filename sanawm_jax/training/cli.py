"""The command line of `train.py` and `sanawm-train`."""

from __future__ import annotations

import sys

from absl import app, flags, logging

from sanawm_jax.runtime.command_line import (
    define_config,
    end_with,
    fail,
    parse_flags,
    show_notes,
    show_progress,
)
from sanawm_jax.runtime.shipped import CONFIGS

flags.disclaim_key_flags()  # the flags belong to the script that calls `main`


def main() -> None:
    """Runs the program with the arguments of the process."""
    argv = define_config(CONFIGS / "small_world.py", "training configuration", sys.argv)
    flags.DEFINE_string(
        "workdir", None, "folder of the run; an old run is continued", required=True
    )
    flags.DEFINE_string("coordinator", None, "host:port of the first process")
    flags.DEFINE_integer("num_processes", None, "number of processes of the run")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    flags.DEFINE_bool("distributed", False, "ask the scheduler for these three")
    app.run(_run, argv=argv, flags_parser=parse_flags)


def _run(_: list[str]) -> None:
    from sanawm_jax.runtime.compilation_cache import use_compilation_cache
    from sanawm_jax.runtime.compiler_flags import use_compiler_flags
    from sanawm_jax.runtime.errors import InputError
    from sanawm_jax.runtime.processes import is_first, join_processes
    from sanawm_jax.training.engine.interrupt import Stopped
    from sanawm_jax.training.engine.loop import train
    from sanawm_jax.training.engine.metrics import TrainingDiverged
    from sanawm_jax.training.recipes.dry_run import describe

    given = flags.FLAGS
    show_notes()
    show_progress()
    try:
        use_compiler_flags()
        if given.config.dry_run:
            print(describe(given.config))
            return
        join_processes(
            given.coordinator, given.num_processes, given.process_id, detect=given.distributed
        )
        if not is_first():
            logging.set_verbosity(logging.WARNING)
        use_compilation_cache()
        train(given.config, given.workdir)
    except InputError as error:
        fail(str(error))
    except Stopped as stopped:
        if is_first():
            print(stopped)
        sys.exit(stopped.status)
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        end_with(error)
    if is_first():
        print(f"{given.workdir}/export")
