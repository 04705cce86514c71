"""Distribution matching and the critic's loss against PyTorch's autograd on diffusers' network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaWMTransformer3DModel

from configs import distill
from sanawm_jax.checkpoints import keymap
from sanawm_jax.core.params import Params
from sanawm_jax.dit.keys import key_table
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.recipes.distill import CRITIC, STUDENT, Distillation
from sanawm_jax.training.recipes.self_forcing import SelfForcing
from tests.parity.compare import float32_attention, randomise, relative
from tests.parity.test_dit import BASE, make_inputs, run_reference

FRAMES = 4


def network(folder: Path, seed: int) -> SanaWMTransformer3DModel:
    sizes = BASE | dict(num_layers=2, softmax_every_n=2)
    model = randomise(SanaWMTransformer3DModel(**sizes), seed)
    model.save_pretrained(folder / "transformer")
    return model  # pyright: ignore[reportReturnType]


class Case:
    """The recipe and the reference with the same weights, on the same made clips."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(0)
        self.teacher, self.critic = network(folder / "teacher", 1), network(folder / "critic", 2)
        config = distill.get_config("smoke")
        config.update(teacher=str(folder / "teacher"), use_camera=True)
        config.critic.weights = str(folder / "critic")
        config.synthetic.update(clips=4, latent_frames=FRAMES, height=3, width=2)
        self.run = Distillation(config, folder)
        networks = {name: self.run.network(name) for name in (STUDENT, CRITIC)}
        self.of = SelfForcing(self.run, networks, {})
        self.params: Params = self.run.init(networks, None)[CRITIC]
        resident = self.run.resident(self.run.frozen(networks))
        resident["null_text"] = rng.normal(size=(7, 16)).astype(np.float32)
        resident["null_mask"] = np.ones((7,), np.int64)
        self.resident = resident
        self.inputs = make_inputs(rng, self.teacher, (FRAMES, 3, 2), 2, 0)
        self.made = jax.numpy.asarray(self.inputs["latents"])
        names = ("text", "text_mask", "camera", "plucker")
        self.conditions = Conditions(*(jax.numpy.asarray(self.inputs[name]) for name in names))
        self.key = jax.random.key(5)

    def reference(self, model: Any, noisy: Any, timesteps: Any, **changes: Any) -> torch.Tensor:
        inputs = {**self.inputs, "latents": np.asarray(noisy), "timesteps": np.asarray(timesteps)}
        with float32_attention():
            return run_reference(model, {**inputs, **changes})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("networks"))


def test_distribution_matching(case: Case) -> None:
    noisy, _, timesteps = case.of.noised(case.made, case.key)
    sigma = torch.from_numpy(np.array(timesteps))[..., None, None, None] / 1000
    x_t, clip = (torch.from_numpy(np.array(a)) for a in (noisy, case.made))
    clip.requires_grad_()
    null = {
        "text": np.tile(case.resident["null_text"], (2, 1, 1)),
        "text_mask": np.tile(case.resident["null_mask"], (2, 1)),
    }
    with torch.no_grad():
        fake, real, uncond = (
            x_t - sigma * case.reference(model, noisy, timesteps, **changes)
            for model, changes in ((case.critic, {}), (case.teacher, {}), (case.teacher, null))
        )
        real = real + 3.0 * (real - uncond)
        size = (clip - real).abs().mean((1, 2, 3, 4), keepdim=True)
        direction = (fake - real) / size
    loss = 0.5 * ((clip - (clip - direction).detach())[:, 1:] ** 2).mean()
    loss.backward()
    found = jax.jit(case.of.matching)(
        case.params, case.resident, case.made, case.conditions, case.key
    )
    assert relative(found.loss, loss) <= 1e-3
    assert relative(found.cotangent, clip.grad) <= 1e-3


@pytest.mark.slow  # the other test has the same networks
def test_critic(case: Case) -> None:
    noisy, noise, timesteps = case.of.noised(case.made, case.key)
    target = torch.from_numpy(np.array(noise - case.made))
    velocity = case.reference(case.critic, noisy, timesteps)
    loss = ((velocity - target)[:, 1:] ** 2).mean()
    loss.backward()
    value, gradients = jax.jit(case.of.critic_gradients)(
        case.params, case.resident, case.made, case.conditions, case.key
    )
    assert relative(value, loss) <= 1e-3
    ours = keymap.export(key_table(case.run.model), gradients)
    theirs = {n: p.grad for n, p in case.critic.named_parameters() if p.grad is not None}
    both = [(ours[n].ravel(), g.ravel()) for n, g in theirs.items()]
    assert relative(np.concatenate([a for a, _ in both]), torch.cat([b for _, b in both])) <= 1e-3
