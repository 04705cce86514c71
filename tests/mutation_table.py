"""Single-line changes of the mathematics that the tests must detect; see `tests.mutations`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One changed line.

    Attributes:
      name: name of the change, which begins with its area.
      file: the file to change, from the root of the repository.
      old: exact text, which the file contains once.
      new: the text that replaces it.
      tests: files or tests that must fail, as arguments of pytest.
      survives: the reason why the tests may pass; empty if they must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


_CAMERA_PARITY = "tests/parity/test_dit_camera.py"
_DISCOUNT = f"{_CAMERA_PARITY}::test_beta_is_discounted"
_AT_SIZE = f"{_CAMERA_PARITY}::test_one_block_at_the_released_head_and_frame_size"


def _dit(case: str) -> str:
    return f"tests/parity/test_dit.py::test_forward[{case}]"


DIT = "sanawm_jax/dit/attention.py"
_DIT = (
    Mutation(
        "dit: no discount of beta in the camera branch",
        DIT,
        "beta = beta / jnp.maximum(inflation, 1.0)[:, :, None]",
        "beta = beta * jnp.maximum(1.0, 1.0)",
        (_DISCOUNT,),
    ),
    Mutation(
        "dit: beta is also raised where keys shrink",
        DIT,
        "beta = beta / jnp.maximum(inflation, 1.0)[:, :, None]",
        "beta = beta / inflation[:, :, None]",
        (_DISCOUNT,),
    ),
    Mutation(
        "dit: the camera's softmax scales by the unpadded head",
        DIT,
        "head_dim = 128 if head_dim <= 128 else 256",
        "pass",
        (_AT_SIZE,),
    ),
    Mutation(
        "dit: padding forgets the state",
        DIT,
        "decay = decay * real + (1.0 - real)",
        "decay = decay * real",
        (_dit("padding_in_the_middle_of_gdn"),),
    ),
    Mutation(
        "dit: padding writes to the state",
        DIT,
        "beta = beta * real[..., None]",
        "beta = beta * jnp.ones_like(real)[..., None]",
        (_dit("padding_in_the_middle_of_gdn"),),
        survives="keys and values of padding are zero, so that beta changes nothing they write",
    ),
    Mutation(
        "dit: the camera's softmax sees padding",
        DIT,
        "layout, key_mask=ctx.key_mask, scale=scale)",
        "layout, key_mask=None, scale=scale)",
        (_dit("only_softmax"),),
    ),
    Mutation(
        "dit: keys of the recurrence are scaled by the head size alone",
        DIT,
        "lambda size, tokens: size**-0.5 * tokens**-0.5",
        "lambda size, tokens: size**-0.5",
        (_dit("one_frame"),),
    ),
    Mutation(
        "dit: rotated queries read the denominator",
        DIT,
        "states, normaliser, q_rot, q, GDN_EPS",
        "states, normaliser, q_rot, q_rot, GDN_EPS",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "dit: rotated keys write the denominator",
        DIT,
        "normaliser = recurrent_states(k, None",
        "normaliser = recurrent_states(k_rot, None",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "dit: the decay is exp(-A) to the wrong power",
        DIT,
        "decay = jnp.exp(-jnp.exp(self.decay_rate_log",
        "decay = jnp.exp(-jax.nn.relu(self.decay_rate_log",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "dit: the short convolution's taps are off by one",
        DIT,
        "+ future * taps[-1 - distance]",
        "+ future * taps[-distance]",
        ("tests/unit/core/test_frames.py",),
    ),
    Mutation(
        "dit: timesteps are rounded, not cut off",
        "sanawm_jax/dit/model.py",
        "jnp.trunc(timesteps",
        "jnp.round(timesteps",
        (_dit("base"),),
    ),
    Mutation(
        "dit: the final layer's shift and scale change places",
        "sanawm_jax/dit/model.py",
        "modulated_norm(x, table[:, :, 1, None], table[:, :, 0, None])",
        "modulated_norm(x, table[:, :, 0, None], table[:, :, 1, None])",
        (_dit("base"),),
    ),
    Mutation(
        "dit: the feed-forward's convolution over frames is not residual",
        "sanawm_jax/dit/feed_forward.py",
        "return y + _over_frames(",
        "return _over_frames(",
        (_dit("one_frame"),),
    ),
)

GEOMETRY = "sanawm_jax/dit/ucpe.py"
UCPE = "kernels_pallas/ucpe/reference.py"
_UCPE = (
    Mutation(
        "ucpe: rays are not scaled to the patches",
        GEOMETRY,
        "- cx / scale[1]) / (fx / scale[1])",
        "- cx) / fx",
        (_dit("patch_2"),),
    ),
    Mutation(
        "ucpe: a token's frame is mirrored",
        GEOMETRY,
        "x = _normalise(jnp.cross(down, z), 1e-6)",
        "x = _normalise(jnp.cross(z, down), 1e-6)",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "ucpe: the inverse has the wrong translation",
        GEOMETRY,
        'shift = -jnp.einsum("...ij,...j->...i", rotation, matrices[..., :3, 3]',
        'shift = -jnp.einsum("...ji,...j->...i", rotation, matrices[..., :3, 3]',
        (_dit("no_softmax"),),
    ),
    Mutation(
        "ucpe: a product of the geometry at the default precision",
        GEOMETRY,
        'jnp.einsum("BFhwij,BFj->BFhwi", to_ray, centre, precision=_HIGHEST)',
        'jnp.einsum("BFhwij,BFj->BFhwi", to_ray, centre)',
        ("tests/kernels/test_gdn_precision.py::test_geometry_of_rays",),
    ),
    Mutation(
        "ucpe: heads are scaled up, not only down",
        UCPE,
        "jnp.minimum(rms(reference) / jnp.maximum(rms(x), eps), 1.0)",
        "rms(reference) / jnp.maximum(rms(x), eps)",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "ucpe: another epsilon in the heads' size",
        UCPE,
        "x: jax.Array, eps: float = 1e-6) -> jax.Array:",
        "x: jax.Array, eps: float = 1e-7) -> jax.Array:",
        (_DISCOUNT,),
    ),
    Mutation(
        "ucpe: the mean inflation before it is squared",
        UCPE,
        "jnp.square(size(y) / size(x)).mean(axis=2)",
        "jnp.square((size(y) / size(x)).mean(axis=2))",
        (_DISCOUNT,),
    ),
    Mutation(
        "ucpe: the way back rotates forwards",
        UCPE,
        "    if inverse:\n        sin = -sin",
        "    if inverse:\n        sin = 1 * sin",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "ucpe: the norm is of each head alone",
        UCPE,
        "rms_norm(x.reshape(*x.shape[:-2], -1), of.scale, of.eps).reshape(x.shape)",
        "rms_norm(x, of.scale.reshape(x.shape[-2:]), of.eps)",
        (_dit("no_softmax"),),
    ),
)

GDN = "kernels_pallas/gdn/reference.py"
_GDN = (
    Mutation(
        "gdn: the decay is not of the whole state",
        GDN,
        "return decay[..., None, None] * (jnp.eye(k.shape[-1], dtype=outer.dtype) - outer)",
        "return jnp.eye(k.shape[-1], dtype=outer.dtype) - decay[..., None, None] * outer",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "gdn: the backward run counts a frame twice",
        GDN,
        "return after, before if exclusive else after",
        "return after, after",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "gdn: a chunk sees the future of the next",
        GDN,
        "before = jnp.where(drop, 0.0, state)",
        "before = jnp.where(False, 0.0, state)",
        ("tests/unit/dit/test_chunk_causal.py",),
    ),
    Mutation(
        "gdn: the denominator's keys are written without beta",
        GDN,
        "jnp.sum(k_beta, axis=2)[..., None, :]",
        "jnp.sum(k, axis=2)[..., None, :]",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "gdn: products at the default precision",
        GDN,
        "jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32",
        "jnp.einsum, preferred_element_type=jnp.float32",
        ("tests/kernels/test_gdn_precision.py::test_states",),
    ),
    Mutation(
        "gdn: products that end in bfloat16",
        GDN,
        "precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32",
        "precision=lax.Precision.HIGHEST, preferred_element_type=jnp.bfloat16",
        ("tests/kernels/test_gdn_precision.py::test_read_out",),
    ),
    Mutation(
        "gdn: ranks of the backward run are counted forwards",
        GDN,
        "order = lax.axis_size(axis_name) - 1 - order",
        "order = 1 * order",
        ("tests/kernels/test_gdn_ranks.py",),
    ),
    Mutation(
        "gdn: the kernels' gradient crosses a reset",
        "kernels_pallas/gdn/api.py",
        "before = (1.0 - drop[i])[:, None, None, None] * jnp.concatenate(parts, 1)",
        "before = jnp.concatenate(parts, 1)",
        ("tests/kernels/test_gdn_pallas.py::test_equals_xla[chunks]",),
    ),
    Mutation(
        "gdn: the kernels' gradient at the default precision",
        "kernels_pallas/gdn/api.py",
        'dw += reference.einsum("bfnvd,bfnve->bfnde"',
        'dw += jnp.einsum("bfnvd,bfnve->bfnde"',
        ("tests/kernels/test_gdn_precision.py::test_api",),
    ),
)

FRAMES = "sanawm_jax/core/frames.py"
_CORE = (
    Mutation(
        "frames: a convolution sees the next chunk's first frame",
        FRAMES,
        "visible = np.arange(layout.padded) + offset < ends",
        "visible = np.arange(layout.padded) + offset <= ends",
        ("tests/unit/core/test_frames.py",),
    ),
    Mutation(
        "frames: a whole last chunk joins the one before it",
        FRAMES,
        "frames - starts[-1] < size",
        "frames - starts[-1] <= size",
        ("tests/unit/core/test_frames.py",),
    ),
    Mutation(
        "frames: chunks attend to the future",
        FRAMES,
        "            k[:, :end],\n            v[:, :end],",
        "            k,\n            v,",
        ("tests/unit/dit/test_chunk_causal.py",),
    ),
    Mutation(
        "rope: another split of a head over the axes",
        "sanawm_jax/core/rope.py",
        "space = head_dim // 6",
        "space = head_dim // 8",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "rope: half a head has frequencies of its own",
        "sanawm_jax/core/rope.py",
        "(theta ** -(np.arange(keep) / count))",
        "(theta ** -(np.arange(keep) / keep))",
        (_dit("no_softmax"),),
    ),
    Mutation(
        "modulation: sines of a timestep come first",
        "sanawm_jax/core/modulation.py",
        "[jnp.cos(angle), jnp.sin(angle)]",
        "[jnp.sin(angle), jnp.cos(angle)]",
        (_dit("one_frame"),),
    ),
)

SCHEDULE = "sanawm_jax/sampling/schedule.py"
_SAMPLES = "tests/parity/test_pipeline.py::test_sample_py_equals_the_reference"
_SCHEDULES = "tests/parity/test_pipeline.py::test_schedule"
_STEP = "tests/unit/sampling/test_euler.py"
_SAMPLING = (
    Mutation(
        "schedule: the shift is applied once",
        SCHEDULE,
        "shifted = shift_sigma(spaced, self.shift)",
        "shifted = shift_sigma(spaced, 1.0)",
        (_SCHEDULES,),
    ),
    Mutation(
        "schedule: the last level is that of the sampler, not of training",
        SCHEDULE,
        "ends = np.array([count, 1], np.float32)",
        "ends = np.array([count, 0], np.float32)",
        (_SCHEDULES,),
    ),
    Mutation(
        "schedule: steps run towards the noise",
        SCHEDULE,
        "moved = latents + (next_sigma - sigma) *",
        "moved = latents + (sigma - next_sigma) *",
        (_STEP,),
    ),
    Mutation(
        "schedule: given frames move",
        SCHEDULE,
        "jnp.where(conditioned[:, None, None, None], latents, moved)",
        "jnp.where(conditioned[:, None, None, None], moved, moved)",
        (_STEP,),
    ),
    Mutation(
        "schedule: given frames have the timestep of the others",
        SCHEDULE,
        "jnp.where(conditioned, 0.0, sigma * 1000.0)",
        "jnp.where(conditioned, sigma * 1000.0, sigma * 1000.0)",
        (_STEP,),
    ),
    Mutation(
        "guidance: starts from the conditional prediction",
        SCHEDULE,
        "return unconditional + scale *",
        "return conditional + scale *",
        (_STEP,),
    ),
    Mutation(
        "guidance: the halves of the batch change places",
        SCHEDULE,
        "unconditional, conditional = jnp.split(",
        "conditional, unconditional = jnp.split(",
        (_STEP,),
    ),
    Mutation(
        "guidance: levels that are next to one another are taken as equal",
        "sanawm_jax/sampling/stage1.py",
        "if s < now - 1e-6",
        "if s < now - 1e-2",
        (_STEP,),
    ),
)

BLOCKS, TILING = "sanawm_jax/vae/blocks.py", "sanawm_jax/vae/tiling.py"
LATENTS = "sanawm_jax/vae/latents.py"
_VAE_BLOCKS = "tests/parity/test_vae.py::test_every_block[published]"
_VAE_PADDING = "tests/parity/test_vae.py::test_padding"
_VAE = (
    Mutation(
        "vae: a causal convolution sees a frame ahead",
        BLOCKS,
        "time = (2, 0) if causal else (1, 1)",
        "time = (1, 1) if causal else (1, 1)",
        (_VAE_PADDING,),
    ),
    Mutation(
        "vae: a reflected border repeats the edge",
        BLOCKS,
        "i = size - 1 - abs(size - 1 - abs(i))",
        "i = size - 1 - abs(size - 1 - abs(i + (i < 0)))",
        (_VAE_PADDING,),
    ),
    Mutation(
        "vae: the gradient of a border is lost",
        BLOCKS,
        "if not 0 <= i < size:",
        "if not 0 <= i <= size:",
        ("tests/unit/vae/test_padding.py",),
    ),
    Mutation(
        "vae: the skip path of downsampling takes the largest",
        BLOCKS,
        '"mean", g=self.group_size)',
        '"max", g=self.group_size)',
        (_VAE_BLOCKS,),
    ),
    Mutation(
        "vae: downsampling repeats the first frame twice",
        BLOCKS,
        "x[:, : self.strides[0] - 1], x]",
        "x[:, 1 : self.strides[0]], x]",
        (_VAE_BLOCKS,),
    ),
    Mutation(
        "vae: upsampling drops frames at the end",
        BLOCKS,
        "self.strides)[:, self.strides[0] - 1 :]",
        "self.strides)[:, : x.shape[1] * self.strides[0] + 1 - self.strides[0]]",
        (_VAE_BLOCKS,),
    ),
    Mutation(
        "vae: upsampling repeats channels one by one",
        BLOCKS,
        "jnp.tile(self._unfold(x), (1, 1, 1, 1, self.repeats))",
        "jnp.repeat(self._unfold(x), self.repeats, -1)",
        (_VAE_BLOCKS,),
    ),
    Mutation(
        "vae: latents are divided by the scaling factor",
        LATENTS,
        "return (latents - mean) * scaling_factor / std",
        "return (latents - mean) / scaling_factor / std",
        ("tests/unit/vae/test_latents.py",),
    ),
    Mutation(
        "vae: latents are drawn with the variance",
        LATENTS,
        "mean + jnp.exp(0.5 * clip_logvar(logvar)) * noise",
        "mean + jnp.exp(clip_logvar(logvar)) * noise",
        ("tests/unit/vae/test_latents.py",),
    ),
    Mutation(
        "vae: the measured deviation is a variance",
        "sanawm_jax/training/recipes/vae.py",
        "std = np.sqrt(np.maximum(second / count - mean**2, 1e-8))",
        "std = np.maximum(second / count - mean**2, 1e-8)",
        ("tests/unit/training/test_latent_statistics.py",),
    ),
    Mutation(
        "vae: tiles are blended one pixel ahead",
        TILING,
        "weight = (jnp.arange(n) / n)",
        "weight = ((jnp.arange(n) + 1) / n)",
        ("tests/unit/vae/test_tiling.py",),
    ),
    Mutation(
        "vae: tiles are blended from their beginning",
        TILING,
        "tail = _end(before, axis, n)",
        "tail = lax.slice_in_dim(before, 0, n, axis=axis)",
        ("tests/unit/vae/test_tiling.py", "tests/parity/test_vae.py::test_tiling"),
    ),
    Mutation(
        "vae: decoded windows drop their first frame",
        TILING,
        "trim=lambda y: y[:, :-1],",
        "trim=lambda y: y[:, 1:],",
        ("tests/parity/test_vae.py::test_tiling",),
    ),
    Mutation(
        "vae: the first window of time keeps no extra frame",
        TILING,
        "keep = min(time.keep + (start == 0), total)",
        "keep = min(time.keep, total)",
        ("tests/unit/vae/test_tiling.py",),
    ),
)

WINDOW, REFINER_ROPE = "sanawm_jax/refiner/kv_window.py", "sanawm_jax/refiner/rope.py"
SAMPLER = "sanawm_jax/refiner/sampler.py"
_WINDOW_TESTS = "tests/unit/refiner/test_kv_window.py"
_ROPE_TESTS = "tests/parity/test_refiner.py::test_rope_at_full_size[split-24.0]"
_REFINER = (
    Mutation(
        "refiner: the window's newest frames take the wrong slots",
        WINDOW,
        "(self.refined + jnp.arange(frames)) % self.history_slots",
        "jnp.minimum(self.refined + jnp.arange(frames), self.history_slots - 1)",
        (_WINDOW_TESTS,),
    ),
    Mutation(
        "refiner: the sink does not move",
        WINDOW,
        "return self.refined - self.history_frames",
        "return self.refined * 0",
        (_WINDOW_TESTS,),
    ),
    Mutation(
        "refiner: a block starts where the sink does",
        WINDOW,
        "return self.sink_frames + self.refined\n",
        "return self.refined\n",
        (_WINDOW_TESTS,),
    ),
    Mutation(
        "refiner: slots that were never written are seen",
        WINDOW,
        "return jnp.minimum(self.refined, self.history_slots)",
        "return jnp.maximum(self.refined, self.history_slots)",
        (_WINDOW_TESTS,),
    ),
    Mutation(
        "refiner: a token sits at its first pixel",
        REFINER_ROPE,
        "middle = (edge[:-1] + edge[1:]) / np.float32(2.0)",
        "middle = edge[:-1]",
        (_ROPE_TESTS,),
    ),
    Mutation(
        "refiner: the first latent frame stands for as many frames as the others",
        REFINER_ROPE,
        "edge = edge + offset - np.float32(config.vae_scale_factors[0])",
        "edge = edge + 0 * offset",
        (_ROPE_TESTS,),
    ),
    Mutation(
        "refiner: time is in frames, not seconds",
        REFINER_ROPE,
        "np.maximum(edge, np.float32(0.0)) / np.float32(fps)",
        "np.maximum(edge, np.float32(0.0)) / np.float32(16)",
        (_ROPE_TESTS,),
    ),
    Mutation(
        "refiner: pairs that do not turn are at the end of the heads",
        REFINER_ROPE,
        "turns = jnp.concatenate([still, turns], 1)",
        "turns = jnp.concatenate([turns, still], 1)",
        (_ROPE_TESTS,),
    ),
    Mutation(
        "refiner: halves of a head rotate the other way",
        REFINER_ROPE,
        "rotated = [first * cos - second * sin, second * cos + first * sin]",
        "rotated = [first * cos + second * sin, second * cos - first * sin]",
        ("tests/parity/test_refiner.py::test_forward[split]",),
    ),
    Mutation(
        "refiner: a block starts from pure noise",
        SAMPLER,
        "return (1.0 - sigma) * clean.astype(jnp.float32) + sigma *",
        "return 0.0 * clean.astype(jnp.float32) + sigma *",
        ("tests/parity/test_refiner.py::test_a_whole_clip[split]",),
    ),
    Mutation(
        "refiner: history is read at the last noise level",
        SAMPLER,
        "_, written = forward(x, 0.0, capture=True)",
        "_, written = forward(x, sigmas[-2], capture=True)",
        ("tests/parity/test_refiner.py::test_a_whole_clip[split]",),
    ),
    Mutation(
        "refiner: a block takes the noise of another one",
        SAMPLER,
        "return noise[:, first - sink_frames : last - sink_frames]",
        "return noise[:, : last - first]",
        ("tests/parity/test_refiner.py::test_a_whole_clip[split]",),
    ),
    Mutation(
        "connectors: tokens stay behind the registers",
        "sanawm_jax/refiner/connectors.py",
        "order = jnp.argsort(~is_token, axis=1, stable=True)",
        "order = jnp.argsort(is_token, axis=1, stable=True)",
        ("tests/parity/test_connectors.py::test_connectors",),
    ),
    Mutation(
        "connectors: padding counts in the mean",
        "sanawm_jax/refiner/connectors.py",
        "jnp.sum(mask != 0, 1, dtype=jnp.float32)[:, None, None, None] * x.shape[2]",
        "jnp.sum(mask == mask, 1, dtype=jnp.float32)[:, None, None, None] * x.shape[2]",
        ("tests/parity/test_connectors.py::test_pack",),
    ),
    Mutation(
        "connectors: states are divided by their deviation",
        "sanawm_jax/refiner/connectors.py",
        "y = (x - mean) / (high - low + _EPS) * _SCALE",
        "y = (x - mean) / (x.std((1, 2), keepdims=True) + _EPS) * _SCALE",
        ("tests/parity/test_connectors.py::test_pack",),
    ),
)

_TEXT = (
    Mutation(
        "text: the first positions are kept, not the last",
        "sanawm_jax/text/prompts.py",
        "rows = np.r_[0, total - max_length + 1 : total]",
        "rows = np.r_[0, 1:max_length]",
        ("tests/unit/text/test_prompts.py",),
    ),
    Mutation(
        "text: one position too many is read",
        "sanawm_jax/text/prompts.py",
        "total = len(tokenizer.encode(chi)) + max_length - 2 if chi else max_length",
        "total = len(tokenizer.encode(chi)) + max_length - 1 if chi else max_length",
        ("tests/unit/text/test_prompts.py", "tests/parity/test_text.py::test_encode_prompt"),
    ),
    Mutation(
        "text: the negative prompt is read after the instruction",
        "sanawm_jax/text/prompts.py",
        "[negative_prompt], max_length=max_length, chi_prompt=()",
        "[negative_prompt], max_length=max_length, chi_prompt=chi_prompt",
        ("tests/parity/test_text.py::test_encode_prompt",),
    ),
)

ACTIONS, RAYS = "sanawm_jax/camera/actions.py", "sanawm_jax/camera/rays.py"
_ACTION_TESTS = ("tests/unit/camera/test_actions.py", "tests/parity/test_camera.py")
_CAMERA = (
    Mutation(
        "actions: keys press as slowly as they coast",
        ACTIONS,
        "press = 1 - math.exp(-_FRAME_SECONDS / _PRESS_SECONDS)",
        "press = 1 - math.exp(-_FRAME_SECONDS / _COAST_SECONDS)",
        _ACTION_TESTS,
    ),
    Mutation(
        "actions: the camera moves before it turns",
        ACTIONS,
        "ahead = _level(rotation[:, 2], rule.heading_eps)",
        "ahead = _level(poses[i, :3, 2], rule.heading_eps)",
        _ACTION_TESTS,
    ),
    Mutation(
        "actions: pitch is in the world's axes",
        ACTIONS,
        "_turn_right(yaw_step) @ poses[i, :3, :3] @ _look_up(pitch_step)",
        "_look_up(pitch_step) @ _turn_right(yaw_step) @ poses[i, :3, :3]",
        _ACTION_TESTS,
    ),
    Mutation(
        "rays: the window of a latent is one frame late",
        RAYS,
        "start = np.maximum(last - (vae_temporal - 1), 0)",
        "start = np.maximum(last - vae_temporal, 0)",
        ("tests/unit/camera/test_rays.py", "tests/parity/test_camera.py"),
    ),
    Mutation(
        "rays: the moment has the wrong sign",
        RAYS,
        "np.cross(centre[:, None], rotation, axisb=1, axisc=1)",
        "np.cross(rotation, centre[:, None], axisa=1, axisc=1)",
        ("tests/unit/camera/test_rays.py",),
    ),
    Mutation(
        "rays: pixels sit at their middle",
        RAYS,
        "(x - cx) / fx, (y - cy) / fy, 1.0",
        "(x + 0.5 - cx) / fx, (y + 0.5 - cy) / fy, 1.0",
        ("tests/unit/camera/test_rays.py", "tests/parity/test_camera.py"),
    ),
    Mutation(
        "intrinsics: a crop moves the principal point the other way",
        "sanawm_jax/camera/intrinsics.py",
        "scaled[..., axis + 2] -= offset[axis]",
        "scaled[..., axis + 2] += offset[axis]",
        ("tests/unit/camera/test_intrinsics.py",),
    ),
    Mutation(
        "intrinsics: shorter sequences are resampled past their end",
        "sanawm_jax/camera/intrinsics.py",
        "np.linspace(0, 1, len(rows)), np.linspace(0, 1, num_frames)",
        "np.arange(len(rows)), np.arange(num_frames)",
        ("tests/unit/camera/test_intrinsics.py",),
    ),
    Mutation(
        "poses: relative translations stay in the world's axes",
        "sanawm_jax/camera/poses.py",
        "(poses[1:, :3, 3] - poses[0, :3, 3]) @ unrotate.T",
        "(poses[1:, :3, 3] - poses[0, :3, 3])",
        ("tests/unit/camera/test_poses.py",),
    ),
    Mutation(
        "poses: ties of the frame count go down",
        "sanawm_jax/camera/poses.py",
        "(2 * rest >= stride)",
        "(2 * rest > stride)",
        ("tests/unit/camera/test_poses.py",),
    ),
)

FLOW, REFINER_FLOW = (
    "sanawm_jax/training/objectives/flow.py",
    "sanawm_jax/training/objectives/refiner_flow.py",
)
TIMESTEPS = "sanawm_jax/training/objectives/timesteps.py"
_FLOW_TESTS = "tests/unit/training/test_flow.py"
_REFINER_FLOW_TESTS = "tests/unit/training/test_refiner_flow.py"
_OBJECTIVES = (
    Mutation(
        "flow: the target runs from the noise to the data",
        FLOW,
        "target=noise - latents,",
        "target=latents - noise,",
        (_FLOW_TESTS,),
    ),
    Mutation(
        "flow: timesteps are those before the shift",
        FLOW,
        "timestep = np.floor(np.round(NUM_STEPS * sigma, 9))",
        "timestep = np.floor(np.round(NUM_STEPS * s, 9))",
        (_FLOW_TESTS,),
    ),
    Mutation(
        "flow: whole timesteps are floored one down",
        FLOW,
        "np.floor(np.round(NUM_STEPS * sigma, 9))",
        "np.floor(NUM_STEPS * sigma - 1e-12)",
        (_FLOW_TESTS,),
    ),
    Mutation(
        "flow: given frames count in the loss",
        FLOW,
        "mask=1.0 - given.astype(jnp.float32),",
        "mask=jnp.ones_like(given, jnp.float32),",
        (_FLOW_TESTS,),
    ),
    Mutation(
        "flow: the loss is a mean over all frames, given ones too",
        FLOW,
        "return mask * (mask.shape[0] / jnp.maximum(jnp.sum(mask), 1.0))",
        "return mask / mask.shape[1]",
        (_FLOW_TESTS,),
    ),
    Mutation(
        "timesteps: a chunk's step is drawn as if it were the last",
        TIMESTEPS,
        "drawn = draw(key, right[chunk], every >= before[:, None])",
        "drawn = draw(key, right[-1], every >= before[:, None])",
        ("tests/unit/training/test_timesteps.py",),
    ),
    Mutation(
        "timesteps: forced chunks are one too few",
        TIMESTEPS,
        "(jnp.arange(chunks) < clean[:, None]), 0, steps)",
        "(jnp.arange(chunks) < clean[:, None] - 1), 0, steps)",
        ("tests/unit/training/test_timesteps.py",),
    ),
    Mutation(
        "refiner flow: the velocity is not divided by the starting level",
        REFINER_FLOW,
        "return Flow((1 - alpha) * truth + alpha * first, (first - truth) / start)",
        "return Flow((1 - alpha) * truth + alpha * first, first - truth)",
        (_REFINER_FLOW_TESTS,),
    ),
    Mutation(
        "refiner flow: levels below the range are not reflected",
        REFINER_FLOW,
        "jnp.where(u < _EPS, 2 * _EPS - u, u)",
        "jnp.where(u < _EPS, _EPS, u)",
        (_REFINER_FLOW_TESTS,),
    ),
    Mutation(
        "refiner flow: levels are clamped, not scaled to the start",
        REFINER_FLOW,
        "return clamp_sigmas(start * u, start)",
        "return clamp_sigmas(u, start)",
        (_REFINER_FLOW_TESTS,),
    ),
)

OPTIMIZER, SPIKES = (
    "sanawm_jax/training/engine/optimizer.py",
    "sanawm_jax/training/engine/spikes.py",
)
_STEP_TESTS = "tests/unit/training/test_step.py"
_TRAINING = (
    Mutation(
        "optimizer: a stack of layers is one matrix",
        "sanawm_jax/core/stack.py",
        r'(re.compile(r"(^|\.)(blocks|layers)\.(?!\d)"), 1),',
        r'(re.compile(r"(^|\.)(layers)\.(?!\d)"), 1),',
        (_STEP_TESTS, "tests/unit/core/test_stack.py"),
    ),
    Mutation(
        "optimizer: biases and norms decay",
        OPTIMIZER,
        'path: path.endswith("kernel") for path',
        "path: True for path",
        (_STEP_TESTS,),
    ),
    Mutation(
        "optimizer: the cosine is of a whole turn",
        OPTIMIZER,
        "jnp.cos(jnp.pi * progress)",
        "jnp.cos(2 * jnp.pi * progress)",
        (_STEP_TESTS,),
    ),
    Mutation(
        "ema: the average is as slow at first as later",
        OPTIMIZER,
        "return jnp.minimum(decay, (1.0 + step) / (10.0 + step))",
        "return jnp.minimum(decay, 1.0 + 0.0 * step)",
        (_STEP_TESTS,),
    ),
    Mutation(
        "ema: the average follows the old weights",
        "sanawm_jax/training/engine/step.py",
        "optax.incremental_update(params, ema,",
        "optax.incremental_update(state.params, ema,",
        (_STEP_TESTS,),
    ),
    Mutation(
        "step: accumulated gradients are a sum",
        "sanawm_jax/training/engine/step.py",
        "return jax.tree.map(lambda a: a / parts, total)",
        "return jax.tree.map(lambda a: a / 1, total)",
        (_STEP_TESTS,),
    ),
    Mutation(
        "spikes: a bad norm counts in the average",
        SPIKES,
        "(jnp.where(good, norm, guard.norm) - guard.norm)",
        "(norm - guard.norm)",
        ("tests/unit/training/test_spikes.py",),
    ),
    Mutation(
        "spikes: the average never forgets",
        SPIKES,
        "share = 1.0 / jnp.minimum(guard.made + 1, policy.window)",
        "share = 1.0 / (guard.made + 1)",
        ("tests/unit/training/test_spikes.py",),
    ),
    Mutation(
        "lora: the product is merged without its scale",
        "sanawm_jax/core/lora.py",
        "(kernel.astype(jnp.float32) + scale * product)",
        "(kernel.astype(jnp.float32) + product)",
        ("tests/unit/core/test_lora.py",),
    ),
    Mutation(
        "lora: alpha is divided by the root of the rank",
        "sanawm_jax/core/lora.py",
        "self.alpha / self.rank",
        "self.alpha / self.rank**0.5",
        ("tests/unit/core/test_lora.py",),
    ),
    Mutation(
        "adapters: every layer is written as the first",
        "sanawm_jax/checkpoints/adapters.py",
        'entry.layout.to_theirs(flat[f"{layer}.{ours}"][entry.index])',
        'entry.layout.to_theirs(flat[f"{layer}.{ours}"][(0,) * len(entry.index)])',
        ("tests/parity/test_refiner_training.py::test_adapters_come_back_and_in_diffusers_names",),
    ),
    Mutation(
        "adapters: alpha of a file is not read",
        "sanawm_jax/checkpoints/adapters.py",
        'alpha = config.get("lora_alpha")\n',
        "alpha = None\n",
        ("tests/parity/test_refiner_training.py::test_adapters_come_back_and_in_diffusers_names",),
    ),
)

_DATA = (
    Mutation(
        "zip latents: tokens past the last pose repeat that pose",
        "sanawm_jax/data/zip_latents.py",
        "    camera[last + 1 :] = camera[last]\n",
        "",
        ("tests/unit/data/test_zip_latents.py",),
    ),
    Mutation(
        "zip latents: the scale is of rotations too",
        "sanawm_jax/data/zip_latents.py",
        "c2w[:, :3, 3] *= scale",
        "c2w[:, :3, 3] /= scale",
        ("tests/unit/data/test_zip_latents.py",),
    ),
    Mutation(
        "zip latents: rows and columns change places",
        "sanawm_jax/data/zip_latents.py",
        "transpose(1, 2, 3, 0)",
        "transpose(1, 3, 2, 0)",
        ("tests/unit/data/test_zip_latents.py",),
    ),
    Mutation(
        "zip latents: intrinsics scale by the height alone",
        "sanawm_jax/data/zip_latents.py",
        "[width / size[0], height / size[1]] * 2",
        "[height / size[1], height / size[1]] * 2",
        ("tests/unit/data/test_zip_latents.py",),
    ),
    Mutation(
        "views: the mirrored principal point is off by one",
        "sanawm_jax/data/views.py",
        "video.shape[2] - 1 - cx",
        "video.shape[2] - cx",
        ("tests/unit/data/test_views.py",),
    ),
    Mutation(
        "views: the world is not mirrored",
        "sanawm_jax/data/views.py",
        "_MIRROR @ c2w @ _MIRROR",
        "c2w @ _MIRROR @ _MIRROR",
        ("tests/unit/data/test_views.py",),
    ),
)

MUTATIONS = (
    *_DIT,
    *_UCPE,
    *_GDN,
    *_CORE,
    *_SAMPLING,
    *_VAE,
    *_REFINER,
    *_TEXT,
    *_CAMERA,
    *_OBJECTIVES,
    *_TRAINING,
    *_DATA,
)
