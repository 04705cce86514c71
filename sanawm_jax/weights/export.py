"""Writes weights in the other layout.

    python -m sanawm_jax.weights.export --weights DIR --layout diffusers --out OUT
    python -m sanawm_jax.weights.export --weights DIR --layout upstream --out OUT

Prints the folders that it wrote, one per line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sanawm_jax.checkpoints.export import export_weights
from sanawm_jax.checkpoints.layouts import LAYOUTS
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(prog="python -m sanawm_jax.weights.export")
    parser.add_argument("--weights", required=True, help="a folder of either layout, or a hub name")
    parser.add_argument("--layout", required=True, choices=LAYOUTS)
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--allow_pickle", action="store_true", help="read upstream's model.pt")
    given = parser.parse_args(arguments)
    try:
        for folder in export_weights(
            given.weights, given.layout, given.out, allow_pickle=given.allow_pickle
        ):
            print(folder)
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
