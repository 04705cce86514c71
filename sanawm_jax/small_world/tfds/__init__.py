"""The small world as a TFDS set: `builder.SmallWorld` writes it, `open_clips` reads it.

Importing this package imports neither tensorflow_datasets nor jax.
"""

from sanawm_jax.small_world.tfds.reader import (
    DATASET_NAME,
    ClipSource,
    find_parts,
    open_clips,
)

__all__ = ["DATASET_NAME", "ClipSource", "find_parts", "open_clips"]
