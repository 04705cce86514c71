"""Writes random weights with the released names, shapes and dtypes.

    python -m sanawm_jax.weights.random_init --out DIR --part all
    python -m sanawm_jax.weights.random_init --out DIR --layout upstream --tiny
    python -m sanawm_jax.weights.random_init --out DIR --layout streaming --part all

The released size takes 18 GB of disk for stage 1 and 64 GB for the refiner; `--tiny` takes
megabytes. The tokenizers are small; they are trained on one prompt. Prints one folder per line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sanawm_jax.checkpoints.layouts import LAYOUTS, RELEASES
from sanawm_jax.checkpoints.random_weights import PARTS, write_random
from sanawm_jax.checkpoints.sizes import RELEASED, TINY
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(prog="python -m sanawm_jax.weights.random_init")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--layout", default="diffusers", choices=(*LAYOUTS, *RELEASES))
    parser.add_argument("--part", default="stage1", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand weights")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    sizes = TINY if given.tiny else RELEASED
    try:
        for folder in write_random(
            given.out, layout=given.layout, part=given.part, sizes=sizes, seed=given.seed
        ):
            print(folder)
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
