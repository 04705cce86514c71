"""TFDS builder of the small world; array_record files, written without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from sanawm_jax.small_world.clip import HELD_OUT_SEED, make_clips


@dataclasses.dataclass(eq=False)
class SmallWorldConfig(tfds.core.BuilderConfig):
    """One part of the set.

    Attributes:
      first_seed: seed of the first training scene.
      num_scenes: training clips, one a scene.
      first_held_out: offset of the first validation scene from `HELD_OUT_SEED`.
      num_held_out: validation clips.
      num_frames: pixel frames a clip.
      height, width: pixels.
    """

    first_seed: int = 0
    num_scenes: int = 0
    first_held_out: int = 0
    num_held_out: int = 0
    num_frames: int = 49
    height: int = 128
    width: int = 128

    def split_seeds(self) -> dict[str, range]:
        """Seeds of each split that has any."""
        held_out = HELD_OUT_SEED + self.first_held_out
        seeds = {
            "train": range(self.first_seed, self.first_seed + self.num_scenes),
            "validation": range(held_out, held_out + self.num_held_out),
        }
        return {split: r for split, r in seeds.items() if len(r)}


class SmallWorld(tfds.core.GeneratorBasedBuilder):
    """Rendered clips with camera poses, intrinsics, captions and action strings.

    Set `on_clip` to a function without arguments to hear of every clip that was generated.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "First.",
        "1.1.0": "Patterns at half the contrast, seen through a lens of 0.7 pixels.",
    }
    BUILDER_CONFIGS: ClassVar = [SmallWorldConfig(name="tiny", num_scenes=16, num_held_out=4)]
    on_clip: Callable[[], None] | None = None

    @property
    def part(self) -> SmallWorldConfig:
        """The builder's configuration."""
        assert isinstance(self.builder_config, SmallWorldConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.part
        shape = (config.num_frames, config.height, config.width, 3)
        features = {
            # As bytes: the default encoding stores every pixel as a 64-bit integer.
            "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
            "c2w": tfds.features.Tensor(shape=(config.num_frames, 4, 4), dtype=np.float32),
            "intrinsics": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "caption": tfds.features.Text(),
            "action": tfds.features.Text(),
            "family": tfds.features.Text(),
            "seed": np.int64,
        }
        seeds = {split: [r.start, r.stop] for split, r in config.split_seeds().items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural scenes seen by a moving camera, with exact poses.",
            features=tfds.features.FeaturesDict(features),
            # Seeds are random already; shuffling would copy every clip through temporary files.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(seeds=seeds),
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager  # nothing is downloaded
        return {s: self._generate_examples(r) for s, r in self.part.split_seeds().items()}

    def _generate_examples(self, seeds: range):
        config = self.part
        for clip in make_clips(seeds, config.num_frames, config.height, config.width):
            yield clip["seed"], clip
            if self.on_clip is not None:
                self.on_clip()
