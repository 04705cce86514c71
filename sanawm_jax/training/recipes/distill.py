"""What the recipes of distillation share: networks, clips, conditions and the exported folder.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.checkpoints.initial_weights import load_initial, open_trained
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.core.lora import build_adapted, combine, init_adapters, merge_lora
from sanawm_jax.core.params import Params, apply, build, cast, from_leaves, init, leaves
from sanawm_jax.core.sharding import place
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.flops import forward_flops
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.numerics import preset
from sanawm_jax.dit.state import Window
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule, check_steps
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.objectives.adapters import lora_of
from sanawm_jax.training.objectives.rollout import Student, check_frames
from sanawm_jax.training.recipes.latent_source import LatentSource, array_source
from sanawm_jax.training.recipes.pair_source import pair_source
from sanawm_jax.training.recipes.stage1_zip import zip_source

TEACHER, STUDENT, CRITIC = "teacher", "student", "critic"
_FRAMED = ("latents", "camera", "plucker")
_CAPTIONS = ("text", "text_mask")
_FORMATS = ("npy", "zip_latents", "ode_lmdb")


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a distillation.

    Attributes:
      graphdef: of the whole network.
      abstract: shapes of what is trained: all weights, or adapters.
      base: which frozen weights the adapters belong to, a name in `base` of the resident data.
    """

    graphdef: nnx.GraphDef
    abstract: Params
    base: str | None = None

    def whole(self, resident: Any) -> Callable[[Params], Params]:
        """What is trained -> the network's weights."""
        if self.base is None:
            return lambda params: params
        return functools.partial(combine, resident["base"][self.base])


class Distillation:
    """A run's networks and clips.

    Args:
      config: of the run, see `configs/distill.py`.
      workdir: of the run.

    Attributes:
      model: configuration of every network.
      graphdef: of it.
      source: the clips.
      window, steps, dtype: of the student.

    Raises:
      InputError: folders, clips, window or steps do not fit each other.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config, self._workdir = config, workdir
        self.dtype = compute_dtype(config.dtype)
        self.steps = check_steps(tuple(config.denoising_step_list))
        self._folder = None
        if config.teacher:
            self._folder = open_trained(
                config.teacher,
                allow_pickle=config.allow_pickle,
                numerics=config.numerics or None,
            )
            self.model = self._folder.dit_config()
        else:
            logging.warning("no teacher is given: a random one serves as a first test")
            numerics = preset(config.numerics or "diffusers")
            self.model = DiTConfig(**config.dit.to_dict(), numerics=numerics)
        self.graphdef, self.abstract = build(DiT, self.model)
        self.source = self._source()
        self.frames = config.frames or self.source.frames
        if self.frames > self.source.frames:
            raise InputError(f"frames={self.frames}: clips have {self.source.frames} latent frames")
        self.window = self._window()
        check_frames(self.frames, self.window)
        self.student = Student(self.graphdef, self.window, self.dtype, config.remat, config.unroll)
        self.starts = (0, *range(self.window.first, self.frames, self.window.size))
        self._arrays = self._on_device() if config.on_device else {}

    def _source(self) -> LatentSource:
        config = self.config
        if config.data.format not in _FORMATS:
            raise InputError(
                f"data.format={config.data.format!r}; use one of {', '.join(_FORMATS)}"
            )
        if config.data.format == "npy":
            return array_source(config, self.model)
        data = ConfigDict(config.to_dict())
        data.data.text_dir = config.data.text_dir or str(self._folder.path if self._folder else "")
        if config.data.format == "ode_lmdb":
            return pair_source(data, self._workdir, self.model, self.steps)
        return zip_source(data, self._workdir, self.model)

    def _window(self) -> Window:
        given = self.config.window
        first = given.first or given.size + 1
        if given.size < 1 or first > self.frames:
            raise InputError(
                f"window: chunks of {first} and then {given.size} latent frames do not fit clips "
                f"of {self.frames}"
            )
        cached = given.cached
        if cached < 0:
            cached = max((self.frames - first) // given.size, 1)
        return Window(first, given.size, cached, sink=given.sink)

    def _on_device(self) -> dict[str, Any]:
        source = self.source
        if source.arrays is None:
            raise InputError("on_device=True needs clips in .npy files; set on_device=False")
        names = (*_FRAMED, *_CAPTIONS, "caption")
        arrays = {
            name: np.asarray(a[:, : self.frames] if name in _FRAMED else a)
            for name, a in source.arrays.items()
            if name in names
        }
        size = sum(a.nbytes for a in arrays.values()) / 2**30
        logging.info("%d clips, %.2f GiB on the device", source.size, size)
        return arrays

    def resident(self, base: dict[str, Params]) -> dict[str, Any]:
        """The resident data of the recipe: clips or the empty caption, and frozen weights."""
        text, mask = self.source.null
        return {**self._arrays, "null_text": text, "null_mask": mask, "base": base}

    def data(self) -> dict[str, Any]:
        """The fields of `Recipe` that say where its batches come from."""
        size = self.source.size - self.config.held_out.clips
        if size < 1:
            raise InputError(
                f"held_out.clips={self.config.held_out.clips} leaves no clip of "
                f"{self.source.size} for training"
            )
        if self._arrays:
            return {"size": size}
        return {"size": size, "read": self.source.read, "stream": self.source.stream}

    def rows(self, resident: Any, batch: Any) -> tuple[jax.Array, Conditions]:
        """The clips of a batch: latents (B, F, H, W, c) float32, and what steers them."""
        if self._arrays:
            rows = {name: resident[name][batch] for name in _FRAMED}
            rows |= {name: resident[name][resident["caption"][batch]] for name in _CAPTIONS}
        else:
            rows = {name: a[:, : self.frames] for name, a in batch.items() if name in _FRAMED}
            rows |= {name: batch[name] for name in _CAPTIONS}
        text, mask = rows["text"].astype(self.dtype), rows["text_mask"]
        cameras: Any = (None, None)
        if self.config.use_camera:
            cameras = rows["camera"], rows["plucker"].astype(self.dtype)
        return rows["latents"].astype(jnp.float32), Conditions(text, mask, *cameras)

    def teacher_schedule(self) -> Schedule:
        """How the teacher is sampled; a folder without scheduler/ was trained with the shift 1."""
        folder = self._folder
        if folder is None or not (folder.path / "scheduler").is_dir():
            return Schedule()
        return folder.schedule()

    def negative(self, resident: Any, conditions: Conditions) -> Conditions:
        """The same conditions with the empty caption."""
        text, mask = conditions.text, conditions.text_mask
        return conditions._replace(
            text=jnp.broadcast_to(resident["null_text"].astype(text.dtype), text.shape),
            text_mask=jnp.broadcast_to(resident["null_mask"], mask.shape),
        )

    def network(self, name: str) -> Network:
        """The network of a learner, all of its weights or adapters.

        Raises:
          InputError: adapters that do not fit.
        """
        section = self.config[name]
        lora = lora_of(section)
        if lora is None:
            return Network(self.graphdef, self.abstract)
        graphdef, abstract = build_adapted(DiT, self.model, lora)
        return Network(graphdef, abstract, name if section.weights else TEACHER)

    def weights(self, name: str) -> Params:
        """Host float32 weights that a learner starts from; its folder's, or the teacher's.

        Raises:
          InputError: the folder is of another network.
        """
        folder = "" if name == TEACHER else self.config[name].weights
        if folder:
            try:
                return load_initial(
                    folder,
                    self.model,
                    allow_pickle=self.config.allow_pickle,
                    network="critic" if name == CRITIC else "generator",
                )
            except InputError as error:
                raise InputError(f"{folder} does not fit the teacher: {error}") from None
        if self._folder is not None:
            return self._folder.load_dit(np.float32, place=lambda path, array: array)[2]
        return random_network(self.model, self.config.seed)

    def init(self, networks: dict[str, Network], places: Any) -> dict[str, Params]:
        """See `Recipe.init`."""
        found = {}
        for i, (name, network) in enumerate(networks.items()):
            if network.base is None:
                # a copy for each learner, because the compiled step donates its state
                made = jax.tree.map(np.array, self.weights(name))
            else:
                key = jax.random.fold_in(jax.random.key(self.config.seed), i)
                made = init_adapters(network.abstract, key)
            found[name] = jax.device_put(made) if places is None else place(made, places[name])
        return found

    def frozen(self, networks: dict[str, Network], *, teacher: bool = True) -> dict[str, Params]:
        """Weights in the compute dtype: the teacher's, and those that adapters belong to."""
        names = {network.base for network in networks.values() if network.base}
        names |= {TEACHER} if teacher else set()
        return {name: cast(self.weights(name), self.dtype) for name in sorted(names)}

    def clip_velocity(
        self,
        network: Network | None,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditions: Conditions,
        *,
        causal: bool = False,
    ) -> jax.Array:
        """The velocity of a whole clip; None is the teacher's graph."""
        return apply(
            network.graphdef if network else self.graphdef,
            params,
            latents.astype(self.dtype),
            timesteps,
            *conditions,
            chunk_starts=self.starts if causal else None,
            remat=self.config.remat,
            unroll=self.config.unroll,
        )

    def forward_flops(self, *, causal: bool) -> float:
        """Of a pass over one clip."""
        height, width = self.source.grid
        return forward_flops(
            self.model,
            self.frames,
            height,
            width,
            len(self.source.null[0]),
            chunk_size=self.window.size if causal else 0,
            camera=self.config.use_camera,
        )

    def merged(self, name: str, network: Network, params: Params) -> Params:
        """The weights of a whole network, adapters merged into their base."""
        lora = lora_of(self.config[name])
        return params if lora is None else merge_lora(self.weights(name), params, lora.scale)

    def export(self, network: Network, params: Params, folder: Path) -> None:
        """Writes the student: `transformer/`, the teacher's other parts, and how it samples."""
        params = self.merged(STUDENT, network, params)
        export_transformer(self.model, params, folder / "transformer", self.config.export_dtype)
        if self._folder is None:
            return
        parts = ("vae", "text_encoder", "tokenizer")
        found = [part for part in parts if (self._folder.path / part).is_dir()]
        for part in found:
            shutil.copytree(self._folder.path / part, folder / part, dirs_exist_ok=True)
        if len(found) == len(parts):
            write_index(
                folder,
                self.teacher_schedule(),
                **self.stream_options(),
                numerics=self._folder.numerics or self._folder.layout_numerics(),
            )

    def stream_options(self) -> dict[str, Any]:
        """See `Stage1Folder.stream_options`."""
        window, cached = self.window, self.config.window.cached
        return {
            "num_frame_per_block": window.size,
            "num_cached_blocks": cached,
            "denoising_step_list": ",".join(f"{step:g}" for step in self.steps),
            **({} if window.sink or cached < 0 else {"no_sink_token": True}),
        }


def random_network(model: DiTConfig, seed: int) -> Params:
    """Random weights without the zeros of a fresh network, whose velocity is zero everywhere."""
    params = init(DiT, model, jax.random.key(seed))
    flat = {}
    for i, (path, leaf) in enumerate(leaves(params)):
        noise = np.random.default_rng((seed, i)).normal(size=leaf.shape)
        flat[path] = np.asarray(leaf) + 0.02 * noise.astype(np.float32)
    return from_leaves(flat)
