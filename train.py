"""Trains a model and, in the same folder, resumes.

    python train.py --config=configs/small_world_vae.py --workdir=DIR [--config.key=value]

Writes DIR/metrics.jsonl, DIR/checkpoints/ and, at the end, DIR/export/ in the diffusers layout.
`--config.dry_run` prints parameter count, memory and shardings instead, and trains nothing.
Exit status 0 with the exported folder as the last line; 2 and one clear line on bad input; 1 if
the loss diverged. SIGTERM saves and exits with 0; the same command goes on.

One of several processes is told so by --coordinator, --num_processes and --process_id, by JAX's
variables of the same meaning, or by --distributed, which asks the scheduler; see docs/sharding.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

from sanawm_jax.runtime.command_line import (
    define_config,
    fail,
    parse_flags,
    show_notes,
    show_progress,
)

_CONFIG = define_config(Path(__file__).parent / "configs/small_world.py", "training configuration")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; an old run is continued", required=True
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of the first process")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of the run")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "ask the scheduler for these three")


def main(_: list[str]) -> None:
    from sanawm_jax.runtime.compilation_cache import use_compilation_cache
    from sanawm_jax.runtime.compiler_flags import use_compiler_flags
    from sanawm_jax.runtime.errors import InputError
    from sanawm_jax.runtime.processes import is_first, join_processes
    from sanawm_jax.training.engine.interrupt import Stopped
    from sanawm_jax.training.engine.loop import train
    from sanawm_jax.training.engine.metrics import TrainingDiverged
    from sanawm_jax.training.recipes.dry_run import describe

    show_notes()
    show_progress()
    use_compiler_flags()
    try:
        if _CONFIG.value.dry_run:
            print(describe(_CONFIG.value))
            return
        join_processes(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            detect=_DISTRIBUTED.value,
        )
        if not is_first():
            logging.set_verbosity(logging.WARNING)
        use_compilation_cache()
        train(_CONFIG.value, _WORKDIR.value)
    except InputError as error:
        fail(str(error))
    except Stopped as stopped:
        if is_first():
            print(stopped)
        return
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    if is_first():
        print(f"{_WORKDIR.value}/export")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
