"""Runs one of the evaluations.

    python -m sanawm_jax.eval small_world --scenes 56 --json table.json
    python -m sanawm_jax.eval refiner --json refiner.json
    python -m sanawm_jax.eval camera --truth A.npy --estimate B.npy --json camera.json
    python -m sanawm_jax.eval videos --videos DIR --json videos.json
    python -m sanawm_jax.eval bench --data DIR --out DIR --method NAME --weights FOLDER

The arguments after the name are those of `python -m sanawm_jax.eval.NAME`; `--help` lists them.
"""

from __future__ import annotations

import importlib
import sys

from sanawm_jax.runtime.command_line import fail

EVALUATIONS = ("small_world", "refiner", "camera", "videos", "bench")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line, by default that of the process."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in EVALUATIONS:
        fail(f"the first argument is the evaluation: one of {', '.join(EVALUATIONS)}")
    else:
        importlib.import_module(f"sanawm_jax.eval.{name}").main(rest[:-1])


if __name__ == "__main__":
    main()
