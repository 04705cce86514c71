"""Every option of sampling, defined once: `sample.py` makes its flags from these fields.

Nothing here imports JAX, so that a command line is checked before the slow imports begin.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from typing import Any

from sanawm_jax.runtime.errors import InputError


def option(text: str, default: Any = dataclasses.MISSING, *, is_flag: bool = True) -> Any:
    """A field of an options class.

    Args:
      text: what `--help` says.
      default: the value where neither the command line nor the configuration has one; without it,
        one of the two must.
      is_flag: whether the command line has it; else only the configuration does.
    """
    return dataclasses.field(default=default, metadata={"help": text, "is_flag": is_flag})


@dataclasses.dataclass(frozen=True)
class RefineOptions:
    """How the refiner cuts a clip into blocks.

    Raises:
      InputError: the sizes leave no room for a block.
    """

    sink_size: int = option(
        "leading latent frames that stay unrefined and that every block sees", 1
    )
    refiner_block_size: int = option("latent frames refined together; 0: the whole clip at once", 3)
    refiner_kv_max_frames: int = option(
        "latent frames that a block sees in addition to its own, the sink included", 11
    )
    refiner_seed: int = option("seed of the refiner's noise", 42)

    def __post_init__(self) -> None:
        sink, block, window = self.sink_size, self.refiner_block_size, self.refiner_kv_max_frames
        if sink < 1:
            raise InputError(f"--sink_size={sink} must be at least 1")
        if block < 0:
            raise InputError(f"--refiner_block_size={block} must be at least 1, or 0 for one block")
        if block and window < sink + block:
            raise InputError(
                f"--refiner_kv_max_frames={window} cannot hold the sink of {sink} and a block of "
                f"{block}; use {sink + block} or more"
            )


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How a stream is cut into chunks, and how a chunk is denoised.

    Raises:
      InputError: chunks without frames, a cache without chunks, or noise levels that do not fall
        from at most 1000 to 0.
    """

    denoising_step_list: str = option(
        "timesteps of a chunk, falling to 0, from which --streaming takes its Euler steps",
        "1000,960,889,727,0",
    )
    num_frame_per_block: int = option("latent frames of a chunk; the first has one more", 3)
    num_cached_blocks: int = option(
        "earlier chunks that the softmax layers see, the sink included; -1: all of the clip", 2
    )
    no_sink_token: bool = option("do not keep the first chunk in sight for good", False)

    def __post_init__(self) -> None:
        size, cached = self.num_frame_per_block, self.num_cached_blocks
        if size < 1:
            raise InputError(f"--num_frame_per_block={size} must be at least 1")
        if cached != -1 and cached < 1:
            raise InputError(
                f"--num_cached_blocks={cached} must be at least 1, or -1 for all chunks"
            )
        if cached == 1 and not self.no_sink_token:
            raise InputError(
                "--num_cached_blocks=1 holds the first chunk alone and never the last one; use 2 "
                "or more, or --no_sink_token"
            )
        assert self.sigmas

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Falling noise levels down to 0, one more than there are steps."""
        what = f"--denoising_step_list={self.denoising_step_list}"
        try:
            levels = [float(word) / 1000 for word in self.denoising_step_list.split(",")]
        except ValueError:
            raise InputError(f"{what} must be numbers with commas between them") from None
        falls = all(a > b for a, b in itertools.pairwise(levels))
        if len(levels) < 2 or not falls or levels[0] > 1 or levels[-1] != 0:
            raise InputError(f"{what} must fall from at most 1000 and end in 0")
        return tuple(levels)


def _of(options: type, name: str) -> Any:
    field = options.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def _unset(options: type, name: str) -> Any:
    """The same option, whose default depends on the weights."""
    field = options.__dataclass_fields__[name]
    text = f"{field.metadata['help']} (default: what the weights say, else {field.default})"
    return dataclasses.field(default=None, metadata={**field.metadata, "help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """One run of `sample.py`; the names of the fields are those of the flags.

    A field without a default takes its value from the configuration if no flag gives it.
    """

    weights: str | None = option(
        "stage 1: small_world, a folder in diffusers or upstream layout, or a hub name", None
    )
    allow_pickle: bool = option("read upstream's model.pt: its tensors only, no code is run", False)
    image: str | None = option("the first frame", None)
    prompt: str | None = option("text, or the path of a UTF-8 file", None)
    negative_prompt: str | None = option("text to steer away from, or a file", None)
    camera: str | None = option(
        "a camera path: .npy, .npz, TUM, KITTI or RealEstate10K text, COLMAP, transforms.json", None
    )
    camera_format: str = option(
        "format of --camera where it cannot be told, see docs/data.md", "auto"
    )
    camera_axes: str = option("axes in arrays and text: opencv or opengl", "opencv")
    camera_direction: str = option("matrices in arrays and text: c2w or w2c", "c2w")
    action: str | None = option(
        'keys and numbers of frames, e.g. "w-40,dw-20", or a .json file of recorded keys; give '
        "either --camera or --action",
        None,
    )
    action_mapping: str = option("meaning of the keys: sana or diffusers")
    intrinsics: str | None = option("a .npy file or fx,fy,cx,cy in pixels of the image", None)
    num_frames: int = option("largest number of frames; the video has 8k+1 of them")
    height: int = option("pixels")
    width: int = option("pixels")
    fps: float = option("frames per second")

    step: int = option("Euler steps of stage 1")
    cfg_scale: float = option("scale of classifier-free guidance; 1 switches it off")
    flow_shift: float | None = option("shift of the noise schedule; 0: the weights' own", None)
    seed: int = option("seed of the initial noise")
    text_length: int = option("number of text tokens")
    latents: str | None = option("initial noise (1, C, T, h, w) in a .npy file", None)
    stage1_latents: str | None = option(
        "skip stage 1 and refine or decode these latents: no image or camera is needed", None
    )

    refiner_weights: str | None = option(
        "stage 2: small_world_refiner, a refiner folder, a folder in upstream's layout that holds "
        "one, or a hub name",
        None,
    )
    no_refiner: bool = option("decode stage 1 without refining it", False)
    refiner_latents: str | None = option(
        "the refiner's noise (1, C, T - sink, h, w) in a .npy file", None
    )
    sink_size: int = _of(RefineOptions, "sink_size")
    refiner_block_size: int = _of(RefineOptions, "refiner_block_size")
    refiner_kv_max_frames: int = _of(RefineOptions, "refiner_kv_max_frames")
    refiner_seed: int = _of(RefineOptions, "refiner_seed")

    streaming: bool = option(
        "sample, refine, decode and write chunk by chunk with a distilled model; the video can be "
        "watched while it grows",
        False,
    )
    denoising_step_list: str | None = _unset(StreamOptions, "denoising_step_list")
    num_frame_per_block: int | None = _unset(StreamOptions, "num_frame_per_block")
    num_cached_blocks: int | None = _unset(StreamOptions, "num_cached_blocks")
    no_sink_token: bool | None = _unset(StreamOptions, "no_sink_token")
    chunk_prompts: str | None = option(
        "a UTF-8 file with the prompt of each chunk of a stream, one per line", None
    )

    dtype: str = option("bfloat16 or float32")
    precision: str = option(
        "stage 1's large matrix products: bf16 (that is, --dtype) or fp8", "bf16"
    )
    numerics: str | None = option(
        "which implementation's numbers stage 1 computes: diffusers, release, streaming, "
        "chunk_causal or trainer; by default that of the folder's layout",
        None,
    )
    offload: str = option(
        "what is moved off the accelerator: none, model (idle networks) or block (idle layers)",
        "none",
    )
    devices: int = option("number of local devices that share the frames of stage 1", 1)
    vae_tiling: str = option("tiles of the VAE: auto, none or always", "auto", is_flag=False)

    save_latents: str | None = option("write the final latents (1, C, T, h, w) to this file", None)
    latents_only: bool = option("stop at the latents and decode nothing", False)
    save_frames: str | None = option(
        "write the decoded frames (F, H, W, 3) in [0, 1] to this .npy file", None
    )
    output_dir: str = option("folder of the video", "outputs")
    name: str = option("the video is NAME_generated.mp4", "sample")
    no_action_overlay: bool = option("do not draw keys and camera path on the video", False)
    overlay: str = option(
        "what is drawn: keys (held keys and a map of the path) or upstream (its keys and stick)",
        "keys",
    )
    benchmark_json: str | None = option(
        "write seconds, gaps between chunks and peak memory of a stream to this file", None
    )

    @property
    def refine(self) -> RefineOptions:
        """The refiner's part.

        Raises:
          InputError: see `RefineOptions`.
        """
        return RefineOptions(**self._part(RefineOptions))

    def stream(self, published: Mapping[str, Any] | None = None) -> StreamOptions:
        """The stream's part.

        Args:
          published: what the weights say, see `Stage1Folder.stream_options`.

        Raises:
          InputError: see `StreamOptions`.
        """
        return StreamOptions(**{**(published or {}), **self._part(StreamOptions)})

    def _part(self, options: type) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(options)}
        return {name: value for name, value in values.items() if value is not None}


KINDS: dict[str, type] = {  # str, int, float or bool; None is "not given" and no type
    name: next(t for t in typing.get_args(hint) or (hint,) if t is not type(None))
    for name, hint in typing.get_type_hints(SampleOptions).items()
    if name in SampleOptions.__dataclass_fields__
}


def make_options(given: Mapping[str, Any], config: Mapping[str, Any]) -> SampleOptions:
    """A flag's value where one is given, else the configuration's, else the field's default.

    An empty text counts as none.

    Args:
      given: values of the flags; None stands for a flag that is not given.
      config: the configuration.

    Raises:
      InputError: an option that has no value at all.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(SampleOptions):
        value = given.get(field.name)
        value = config.get(field.name) if value is None else value
        if value not in (None, ""):
            values[field.name] = float(value) if KINDS[field.name] is float else value
        elif field.default is dataclasses.MISSING:
            raise InputError(f"{field.name} has no value; give --{field.name}")
    return SampleOptions(**values)
