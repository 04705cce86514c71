"""The steps of `sample.py`: check everything, make the video, write the files."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sanawm_jax.media.video import check_writable, frame_rate, to_uint8, write_mp4
from sanawm_jax.memory.plan import Need, check_fits
from sanawm_jax.runtime.atomic import check_output
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling import streaming
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.latents import channels_last, check_finite, read_latents, write_npy
from sanawm_jax.sampling.options import SampleOptions
from sanawm_jax.sampling.refine import LTX2Refiner
from sanawm_jax.sampling.request import OVERLAYS, Request
from sanawm_jax.text.prompts import read_prompt


def sample(options: SampleOptions) -> Path:
    """Runs one command line.

    Returns:
      The path of the video, or with `latents_only` that of the latents.

    Raises:
      InputError: one line on what is wrong, before anything is compiled.
    """
    o = options
    if o.latents_only and not o.save_latents:
        raise InputError("--latents_only writes nothing without --save_latents FILE.npy")
    needs_stage1 = not (o.stage1_latents and o.latents_only)
    if not o.weights and needs_stage1:
        raise InputError("no weights: give --weights with a folder or a hub name")
    video = _check_outputs(o)
    if o.streaming:
        o.stream()  # raises if its options do not fit
    elif o.chunk_prompts or o.benchmark_json:
        raise InputError("--chunk_prompts and --benchmark_json belong to --streaming")
    prompt = read_prompt(o.prompt) if o.prompt else None
    refiner, dropped = None, 0
    if o.refiner_weights and not o.no_refiner:
        refiner = LTX2Refiner.from_pretrained(
            o.refiner_weights, dtype=o.dtype, options=o.refine, offload=o.offload
        )
        dropped = o.sink_size  # latent frames, and so pixel frames, before the first refined one
    model = None
    if needs_stage1:
        model = SanaWM.from_pretrained(
            str(o.weights),
            dtype=o.dtype,
            tiling=o.vae_tiling,
            offload=o.offload,
            devices=o.devices,
            precision=o.precision,
            allow_pickle=o.allow_pickle,
            numerics=o.numerics,
        )
    chunks = o.stream(model.folder.stream_options() if model else None)
    request = noise = kept = given = None
    if o.stage1_latents:
        given = read_latents(o.stage1_latents, None)
        if model:
            _check_channels(model, given, o.stage1_latents)
            model.check("decoder")
        if refiner:
            noise = refiner.check(given.shape, prompt, o.refiner_latents)
        decoded = None if o.latents_only else model
        shape = given.shape
        check_fits(lambda: _later_needs(refiner, decoded, shape), o.offload)
    else:
        assert model is not None
        if not o.image:
            raise InputError("no image: give --image with the first frame")
        if not prompt:
            raise InputError("no prompt: give --prompt with a text or the path of a text file")
        request = model.request(
            o.image,
            camera=o.camera,
            camera_format=o.camera_format,
            camera_axes=o.camera_axes,
            camera_direction=o.camera_direction,
            action=o.action,
            action_mapping=o.action_mapping,
            intrinsics=o.intrinsics,
            num_frames=o.num_frames,
            height=o.height,
            width=o.width,
            chunk=chunks.num_frame_per_block if o.streaming else 1,
        )
        if refiner:
            noise = refiner.check(model.latent_shape(request), prompt, o.refiner_latents)
        if not o.latents_only:
            model.check("decoder")
        check_fits(lambda: _needs(model, refiner, request, o), o.offload)
    if o.streaming:
        final, frames = streaming.stream(
            o, chunks, model, refiner, request, prompt, given, noise, video
        )
        if o.save_latents:
            write_npy(o.save_latents, final)
        if o.save_frames and frames is not None:
            write_npy(o.save_frames, frames)
        return video or Path(str(o.save_latents))
    if given is not None:
        final = given
    else:
        assert model is not None and request is not None and prompt is not None
        final = model(
            request,
            prompt,
            negative_prompt=read_prompt(o.negative_prompt) if o.negative_prompt else "",
            steps=o.step,
            cfg_scale=o.cfg_scale,
            flow_shift=o.flow_shift or None,
            seed=o.seed,
            latents=o.latents,
            text_length=o.text_length,
            decode=False,
        ).latents
        if refiner or not o.latents_only:
            kept = _keep(_stage1_file(o), final)
        check_finite(final, "stage 1")
    with _going_on_from(kept):
        if refiner:
            if model:
                model.release()
            final = refiner(final, str(prompt), fps=o.fps, noise=noise)
            check_finite(final, "the refiner")
        if o.save_latents:
            write_npy(o.save_latents, final)
        if video is None or model is None:
            return Path(str(o.save_latents))
        # the sink stays unrefined: it steers the refiner and is not part of the video
        windows = model.decode_stream(jnp.asarray(channels_last(final)))
        windows = _drop_frames(windows, dropped)
        if o.save_frames:
            frames = np.concatenate(list(windows))
            write_npy(o.save_frames, frames)
            windows = iter([frames])
        # from here on frame by frame: the whole video is never in memory
        pictures = itertools.chain.from_iterable(map(to_uint8, windows))
        if request and not o.no_action_overlay:
            painter = request.painter(dropped, o.action_mapping, o.overlay)
            pictures = painter.paint_all(pictures)
        return write_mp4(video, pictures, o.fps)


def _check_outputs(options: SampleOptions) -> Path | None:
    """Checks that every file which the run writes at its end can be written.

    Returns:
      The path of the video, or None if none is made.

    Raises:
      InputError: the rate, the overlay or a name cannot be used, or two files have one name.
    """
    o = options
    frame_rate(o.fps)
    if o.overlay not in OVERLAYS:
        raise InputError(f"unknown --overlay={o.overlay}; use one of {', '.join(OVERLAYS)}")
    video = None
    if not o.latents_only:
        video = check_writable(o.output_dir) / f"{o.name}_generated.mp4"
    named = [Path(f) for f in (o.save_latents, o.save_frames, o.benchmark_json) if f]
    files = [*([video] if video else []), *named, *([] if o.streaming else [_stage1_file(o)])]
    for number, file in enumerate(files):
        check_output(file)
        if file.absolute() in [other.absolute() for other in files[:number]]:
            raise InputError(f"two files of this run are to be written to {file}; rename one")
    return video


def _stage1_file(options: SampleOptions) -> Path:
    """Where the latents of stage 1 are kept in case that a later stage fails."""
    where = Path(str(options.save_latents)).parent if options.latents_only else options.output_dir
    return Path(where) / f"{options.name}_stage1_latents.npy"


def _needs(
    model: SanaWM, refiner: LTX2Refiner | None, request: Request, options: SampleOptions
) -> list[list[Need]]:
    """What a run from an image needs; when the refiner runs, stage 1's networks are released."""
    shape, decode = model.latent_shape(request), not options.latents_only
    needs = model.needs(
        shape,
        text_length=options.text_length,
        has_guidance=options.cfg_scale > 1,
        decode=decode and not refiner,
    )
    return [needs, *_later_needs(refiner, model if decode else None, shape)]


def _later_needs(
    refiner: LTX2Refiner | None, model: SanaWM | None, shape: tuple[int, ...]
) -> list[list[Need]]:
    """What the stages after stage 1 need; each of their networks is alone on the device."""
    needs = refiner.needs(shape) if refiner else []
    return [[need] for need in (*needs, *([model.decoder_need(shape)] if model else []))]


def _keep(file: Path, latents: np.ndarray) -> Path | None:
    """Writes stage 1's latents in case the run fails later; a run goes on if that is impossible."""
    try:
        write_npy(file, latents)
    except OSError as error:
        warnings.warn(f"stage 1 is not kept: {file} cannot be written ({error})", stacklevel=2)
        return None
    warnings.warn(
        f"stage 1 is kept: --stage1_latents={file} refines or decodes it again", stacklevel=2
    )
    return file


@contextlib.contextmanager
def _going_on_from(kept: Path | None) -> Iterator[None]:
    """Adds a note to whatever error ends the block: how to continue from stage 1's latents."""
    try:
        yield
    except BaseException as error:
        if kept is not None:
            error.add_note(f"--stage1_latents={kept} goes on from the end of stage 1")
        raise


def _drop_frames(windows: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The windows without the first `count` frames."""
    for window in windows:
        if len(window) > count:
            yield window[count:]
        count = max(0, count - len(window))


def _check_channels(model: SanaWM, latents: np.ndarray, file: str) -> None:
    channels = model.vae_config.latent_channels
    if latents.shape[1] != channels:
        raise InputError(f"{file} has {latents.shape[1]} channels, the VAE takes {channels}")
