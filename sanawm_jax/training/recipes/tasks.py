"""What is trained: initial weights, data on the device, the loss, and how to export."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax import lax

from sanawm_jax.checkpoints.adapters import save_adapters
from sanawm_jax.checkpoints.export import export_transformer, export_vae
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.data.latent_cache import (
    TextEncoder,
    build_cache,
    clip_encoder,
    fingerprint_of,
    read_clips,
    to_signed,
)
from sanawm_jax.data.views import ALL_VIEWS
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import key_table
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.gemma import Tower, text_tower
from sanawm_jax.text.keys import load_text_encoder
from sanawm_jax.text.prompts import CHI_PROMPT, encode_texts
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.engine.step import Loss, Metrics, Prepare
from sanawm_jax.training.objectives.stage1 import Stage1Objective
from sanawm_jax.training.objectives.vae_loss import VAELossWeights, vae_loss
from sanawm_jax.training.samples import first_rows, stage1_samples
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import load_vae
from sanawm_jax.vae.latents import sample_posterior
from sanawm_jax.vae.model import VideoVAE

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that differs between one training run and another.

    Attributes:
      abstract: shapes of the weights.
      init: shardings or None -> initial weights.
      resident: data that stay on the device.
      size: number of examples.
      prepare, loss: see `training.step`.
      export: averaged weights -> files.
      read: (K, B) indices -> arrays (K, B, ...) of the host, what `prepare` gets as its batch;
        None gives it the indices themselves, into `resident`.
      stream: (rows of a batch, seed) -> an iterator of these rows of the batches; a task that has
        one reads its examples itself.
      flops: of a training step's share of one example; 0 if they are not counted.
      sample: (weights, resident data, folder) -> writes what the weights make of some examples;
        None if the task shows nothing.
    """

    abstract: Params
    init: Callable[[Any], Params]
    resident: Any
    size: int
    prepare: Prepare
    loss: Loss
    export: Callable[[Params], None]
    read: Callable[[np.ndarray], Any] | None = None
    stream: Callable[[np.ndarray, int], ZipStream] | None = None
    flops: float = 0.0
    sample: Callable[[Params, Any, Path], None] | None = None


def make_task(config: ml_collections.ConfigDict, workdir: Path) -> Task:
    """The task that `config.task` names; see `configs/`.

    Raises:
      InputError: unknown task, missing data or weights.
    """
    from sanawm_jax.training.recipes.refiner import refiner_task
    from sanawm_jax.training.recipes.stage1 import stage1_task

    makers = {"vae": vae_task, "dit": dit_task, "stage1": stage1_task, "refiner": refiner_task}
    if config.task not in makers:
        raise InputError(f"task={config.task!r}; use one of {', '.join(makers)}")
    return makers[config.task](config, workdir)


def open_source(config: ml_collections.ConfigDict) -> Sequence:
    """Clips of the set in `config.data_dir`; empty renders `config.synthetic` clips right here."""
    if config.data_dir:
        from sanawm_jax.small_world.tfds import open_clips

        return open_clips(config.data_dir, "train")
    from sanawm_jax.small_world.clip import make_clips

    made = config.synthetic
    logging.warning("no data_dir is given: training on %d clips rendered now", made.clips)
    return list(make_clips(range(made.clips), made.num_frames, made.height, made.width))


def pack_clips(clips: Sequence) -> np.ndarray:
    """All videos, (n, F, H, W * 3 / 4) uint32: four bytes a number."""
    first = clips[0]["video"]
    # packed, a set that fits an accelerator stays below 2^31 elements, which 32-bit indices reach
    packed = np.empty((len(clips), *first.shape[:2], first.shape[2] * 3 // 4), np.uint32)
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(clips), 64):
            indices = range(start, min(start + 64, len(clips)))
            for i, clip in zip(indices, read_clips(clips, indices, pool), strict=True):
                packed[i] = (
                    np.ascontiguousarray(clip["video"])
                    .reshape(*first.shape[:2], -1)
                    .view(np.uint32)
                )
    return packed


def crop_clips(packed: jax.Array, indices: jax.Array, starts: jax.Array, frames: int) -> jax.Array:
    """Runs of frames of some clips: (B,) indices and first frames -> (B, frames, H, W, 3) uint8."""

    def one(index: jax.Array, start: jax.Array) -> jax.Array:
        size = (1, frames, *packed.shape[2:])
        return lax.dynamic_slice(packed, (index, start, 0, 0), size)[0]

    crop = jax.vmap(one)(indices, starts)
    pixels = lax.bitcast_convert_type(crop, jnp.uint8)  # B F H W*3/4 4
    return pixels.reshape(*crop.shape[:3], -1, 3)


def vae_task(config: ml_collections.ConfigDict, workdir: Path) -> Task:
    """Trains the autoencoder on random runs of frames; measures the latents before export."""
    model = VAEConfig(**config.vae.to_dict())
    clips = open_source(config)
    packed = pack_clips(clips)
    frames, total = config.clip_frames, packed.shape[1]
    if frames > total:
        raise InputError(f"clip_frames={frames} is more than the {total} frames of a clip")
    logging.info("%d clips, %.2f GiB on the device", len(packed), packed.nbytes / 2**30)
    graphdef, abstract = build(VideoVAE, model)
    dtype = compute_dtype(config.dtype)
    weights = VAELossWeights(**config.loss.to_dict())

    def prepare(
        resident: jax.Array, batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        crop_key, noise_key = jax.random.split(key)
        starts = jax.random.randint(crop_key, batch.shape, 0, total - frames + 1)
        video = to_signed(crop_clips(resident, batch, starts, frames))
        latent = jax.eval_shape(encode, abstract, video)[0].shape
        return video, jax.random.normal(noise_key, latent)

    def encode(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = apply(graphdef, params, video.astype(dtype), method="encode")
        return mean.astype(jnp.float32), logvar.astype(jnp.float32)

    def loss(params: Params, examples: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Metrics]:
        video, noise = examples
        mean, logvar = encode(params, video)
        latents = sample_posterior(mean, logvar, noise)
        decoded = apply(graphdef, params, latents.astype(dtype), method="decode")
        return vae_loss(decoded, video, mean, logvar, weights)

    def export(params: Params) -> None:
        params = with_statistics(model, params, packed, config.statistics_clips)
        export_vae(model, params, workdir / "export" / "vae", config.export_dtype)

    def make(shardings: Any) -> Params:
        return init(VideoVAE, model, jax.random.key(config.seed), shardings=shardings)

    return Task(abstract, make, packed, len(packed), prepare, loss, export)


def with_statistics(config: VAEConfig, params: Params, packed: np.ndarray, clips: int) -> Params:
    """`params` with latents_mean and latents_std, (C,), measured on up to `clips` whole clips."""
    # the encoder normalises with what it is given: the identity measures the bare latents
    channels = config.latent_channels
    bare = {
        **params,
        "latents_mean": jnp.zeros((channels,)),
        "latents_std": jnp.full((channels,), config.scaling_factor),
    }
    encode = clip_encoder(config)
    size = min(8, len(packed))
    count, first, second = 0, 0.0, 0.0
    for start in range(0, min(clips, len(packed)) - size + 1, size):
        indices = jnp.arange(size)
        part = jnp.asarray(packed[start : start + size])
        video = crop_clips(part, indices, jnp.zeros_like(indices), packed.shape[1])
        latents = np.asarray(encode(bare, video), np.float64)
        count += latents[..., 0].size
        first += latents.sum((0, 1, 2, 3))
        second += np.square(latents).sum((0, 1, 2, 3))
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, 1e-8))
    return {
        **params,
        "latents_mean": jnp.asarray(mean, jnp.float32),
        "latents_std": jnp.asarray(std, jnp.float32),
    }


def dit_task(config: ml_collections.ConfigDict, workdir: Path) -> Task:
    """Trains stage 1 on cached latents of a trained autoencoder."""
    if not config.vae_dir:
        raise InputError("vae_dir is empty; give the vae/ folder that an autoencoder run exported")
    return task_of_cache(config, workdir, cached_clips(config, workdir, open_source(config)))


def task_of_cache(
    config: ml_collections.ConfigDict,
    workdir: Path,
    cache: dict[str, np.ndarray],
    **options: Any,
) -> Task:
    """Stage 1 on encoded clips that lie on the device.

    Args:
      cache: of `cached_clips`.
      options: of every call of the network, see `Stage1Objective`.
    """
    folder = workdir / "export"
    resident: dict[str, Any] = {name: np.asarray(a) for name, a in cache.items()}
    size = len(cache["latents"])
    logging.info(
        "%d clips, %.2f GiB on the device", size, sum(a.nbytes for a in resident.values()) / 2**30
    )
    model = DiTConfig(
        in_channels=cache["latents"].shape[-1],
        caption_channels=cache["text"].shape[-1],
        chunk_plucker_channels=cache["plucker"].shape[-1],
        **config.dit.to_dict(),
    )
    objective = Stage1Objective(config, model, cache["latents"].shape[1], **options)

    def prepare(resident: dict[str, jax.Array], batch: jax.Array, key: jax.Array) -> Any:
        rows = {name: resident[name][batch] for name in ("latents", "camera", "plucker")}
        caption = resident["caption"][batch]
        text, mask = resident["text"], resident["text_mask"]
        rows = {**rows, "text": text[caption], "text_mask": mask[caption]}
        return objective.prepare(rows, (text[-1], mask[-1]), key)

    def export(params: Params) -> None:
        export_stage1(objective, model, params, config, folder)
        shutil.copytree(config.vae_dir, folder / "vae", dirs_exist_ok=True)
        for part in ("tokenizer", "text_encoder"):
            if _text_folder(config, workdir) != folder:
                shutil.copytree(
                    _text_folder(config, workdir) / part, folder / part, dirs_exist_ok=True
                )
        write_index(folder, Schedule(shift=config.flow_shift))

    resident.update(objective.frozen())
    return Task(
        abstract=objective.abstract,
        init=objective.init,
        resident=resident,
        size=size,
        prepare=prepare,
        loss=objective.loss,
        export=export,
        flops=objective.flops(cache["latents"].shape[2:4], cache["text"].shape[1]),
        sample=stage1_samples(config, objective, functools.partial(first_rows, cache)),
    )


def export_stage1(
    objective: Stage1Objective,
    model: DiTConfig,
    params: Params,
    config: ml_collections.ConfigDict,
    folder: Path,
) -> None:
    """Writes `transformer/`, adapters merged into it, and those alone as `lora/` for PEFT."""
    if objective.lora:
        save_adapters(
            folder / "lora",
            params,
            objective.lora,
            key_table(model),
            base=config.init_weights,
            dtype=jnp.dtype(config.export_dtype),
        )
    whole = objective.merged(params)
    export_transformer(model, whole, folder / "transformer", config.export_dtype)


def cache_folder(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Where encoded clips are; a run may take those of another one."""
    given = config.get("cache_dir", "")
    return Path(given).expanduser().absolute() if given else workdir / "latents"


def _text_folder(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    return Path(config.text_dir) if config.text_dir else workdir / "export"


def caption_encoder(tower: Tower, tokenizer: Tokenizer, length: int) -> TextEncoder:
    """Captions -> hidden states (B, length, C) and mask (B, length), as sampling reads prompts."""

    def encode(texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        # the null caption is what sampling gives as negative prompt: no chi prompt before it
        chi = CHI_PROMPT if any(texts) else ()
        return encode_texts(tower, tokenizer, texts, max_length=length, chi_prompt=chi)

    return encode


def cached_clips(
    config: ml_collections.ConfigDict, workdir: Path, clips: Sequence
) -> dict[str, np.ndarray]:
    """The clips as stage 1 sees them, see `data.latent_cache`, in `config.cache_dir` if given."""
    vae_config, vae_params = load_vae(config.vae_dir, dtype=np.float32)
    text = _text_folder(config, workdir)
    if not (text / "text_encoder" / "config.json").is_file():
        if config.text_dir:
            raise InputError(f"{text} holds no text_encoder/; leave text_dir empty to make one")
        with ThreadPoolExecutor(16) as pool:
            captions = [c["caption"] for c in read_clips(clips, range(len(clips)), pool)]
        make_small_text_encoder(sorted(set(captions)), text, hidden=config.text_width)
    tower = text_tower(*load_text_encoder(text / "text_encoder"), dtype=jnp.float32)
    encode = caption_encoder(tower, Tokenizer(text / "tokenizer"), config.text_length)
    files = [
        *Path(config.vae_dir).glob("*.safetensors"),
        *(text / "text_encoder").glob("*.safetensors"),
    ]
    shape = clips[0]["video"].shape
    views = ALL_VIEWS[: config.views]
    facts = (config.data_dir, len(clips), shape, config.text_length, views)
    return build_cache(
        cache_folder(config, workdir),
        clips,
        vae_config,
        vae_params,
        encode,
        fingerprint=fingerprint_of(files, *facts),
        batch_size=config.cache_batch,
        views=views,
    )
