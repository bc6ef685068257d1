"""SFT-PG, by the five proofs."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from diffusers_ext.training._data import SampleNoise, collate, generator_for, load_dataset
from diffusers_ext.training._policy import log_density, transition
from diffusers_ext.training.train_sft_pg import (
    _DRAWN,
    _ORDER,
    Critic,
    SFTTask,
    Value,
    _Rounds,
    main,
    parse_args,
    policy_loss,
)
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.methods.test_mmd_ddm import grey_pictures
from tests.test_training import launch
from tests.tiny_models import unconditional

exact = pytest.mark.proof("exact")
GOLDEN = Path(__file__).parents[1] / "golden" / "sft_pg.json"


def inputs(folder: Path) -> dict:
    if not (folder / "ddpm").is_dir():
        unconditional(folder / "ddpm")
    return {
        "pretrained_model_name_or_path": folder / "ddpm", "train_data_dir": grey_pictures(folder), "resolution": 16,
        "num_inference_steps": 3, "train_batch_size": 4, "num_validation_images": 1, "critic_channels": 4,
        "value_width": 16, "n_critic": 2, "n_generator": 3,
    }  # fmt: skip


COMMON = CommonCase(inputs=inputs)


def flags(folder: Path, output: str, **more) -> list[str]:
    values = {**inputs(folder), "output_dir": folder / output, "max_train_steps": 2, "seed": 3, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(num_processes=1, device=torch.device("cpu"), reduce=lambda value, _: value)


def short(steps: int, **config) -> DDIMScheduler:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **config)
    scheduler.set_timesteps(steps)
    return scheduler


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_a_step_is_that_of_ddim_with_eta_one_and_has_the_mean_of_ddpm():
    scheduler = short(10)
    x, epsilon, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for t in scheduler.timesteps:
        mean, std = transition(scheduler, epsilon, t.expand(2), x, 0.05)
        wanted = scheduler.step(epsilon, t, x, eta=1.0, variance_noise=noise).prev_sample
        taken = mean + std * noise * (1.0 if t > 99 else 0.0)
        assert torch.allclose(taken, wanted, atol=1e-6)
        assert (std == 0.05).all() if t == 99 else (std > 0.05).all()
    every = DDPMScheduler(clip_sample=False)  # of 1000 steps: neighbours in both
    whole = short(1000)
    t = torch.tensor(500)
    mean, std = transition(whole, epsilon, t.expand(2), x, 0.05)
    posterior = every.step(epsilon, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    assert torch.allclose(mean + std * drawn, posterior, atol=1e-5)


@exact
def test_steps_of_different_times_in_one_batch_are_each_its_own():
    scheduler = short(10)
    x, epsilon = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([999, 299, 99])
    mean, std = transition(scheduler, epsilon, times, x, 0.05)
    for i, t in enumerate(times):
        one = transition(scheduler, epsilon[i : i + 1], t[None], x[i : i + 1], 0.05)
        assert torch.equal(mean[i], one[0][0]) and torch.equal(std[i], one[1][0])
    law = torch.distributions.Normal(mean, std.expand_as(mean))
    assert torch.allclose(log_density(mean, std, x), law.log_prob(x), rtol=1e-5)


@exact
def test_the_policy_gradient_is_the_pathwise_gradient():
    """With a cost that is linear and known, and the densities summed over all steps: within three standard errors."""
    scheduler = short(2, num_train_timesteps=2)
    scheduler.alphas_cumprod = torch.tensor([0.8, 0.3], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    count, last = 400_000, 0.3
    generator = torch.Generator().manual_seed(0)
    start, *noises = torch.randn(3, count, 1, generator=generator, dtype=torch.float64)

    def run(differentiate: bool):
        x, states, laws = start, [start], []
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            mean, std = transition(scheduler, theta[0] * x + theta[1], t.expand(count), x, last)
            assert (std >= 0.3).all()
            laws.append((mean, std))
            x = mean + std * noise
            x = x if differentiate else x.detach()
            states.append(x)
        return states, laws

    states, _ = run(True)
    wanted = torch.autograd.grad(2 * states[-1].mean(), theta)[0]
    states, laws = run(False)
    log_prob = torch.stack([log_density(*law, after) for law, after in zip(laws, states[1:], strict=True)]).sum(0)[:, 0]
    cost = 2 * states[-1][:, 0]
    advantage = cost - cost.mean()
    for index in range(2):
        mean, inner = theta.detach().clone(), torch.zeros(2, dtype=torch.float64)
        inner[index] = 1.0
        # The derivative of each run's log-density, for the standard error.
        slope = 0.0
        for (_, std), (before, after), t in zip(laws, itertools.pairwise(states), scheduler.timesteps, strict=True):
            low, high = (
                transition(scheduler, (mean + sign * 1e-4 * inner)[0] * before + (mean + sign * 1e-4 * inner)[1], t.expand(count), before, last)[0]
                for sign in (-1, 1)
            )  # fmt: skip
            center = transition(scheduler, mean[0] * before + mean[1], t.expand(count), before, last)[0]
            slope = slope + (after - center) / std.square() * (high - low) / 2e-4
        terms = advantage * slope[:, 0]
        error = terms.std() / count**0.5
        assert abs(terms.mean() - wanted[index]) < 3 * error and error < 0.2 * abs(wanted[index])
        found = torch.autograd.grad((advantage.detach() * log_prob).mean(), theta, retain_graph=True)[0]
        assert found[index].item() == pytest.approx(terms.mean().item(), rel=1e-5)


@exact
def test_the_loss():
    log_prob = torch.tensor([[[1.0, 3.0]], [[0.0, 4.0]]], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = policy_loss(advantage, log_prob)
    assert loss.item() == (2 * 2 - 1 * 2) / 2
    (slope,) = torch.autograd.grad(loss, log_prob)
    assert slope.tolist() == [[[0.5, 0.5]], [[-0.25, -0.25]]]


@exact
def test_recomputed_densities_of_stored_steps_are_those_they_were_taken_with(tmp_path):
    task = SFTTask(parse_args(flags(tmp_path, "out")))
    dataset = load_dataset(task.args, annotations=())
    task.prepare(dataset, accelerator())
    task.pipeline.unet.eval()
    seen = []
    law = task.law

    def noted(sample, step):
        seen.append(law(sample, step))
        return seen[-1]

    task.law = noted
    runs = task.draw(0, torch.arange(4), 4)
    for k, (mean, std) in enumerate(seen[:3]):
        with torch.no_grad():
            again = log_density(*law(runs[k], torch.full((4,), k)), runs[k + 1])
        assert torch.equal(again, log_density(mean, std, runs[k + 1]))


@exact
def test_the_trainer_is_the_papers_algorithm(tmp_path):
    """Two rounds against a loop written out."""
    main(flags(tmp_path, "ours", max_train_steps=4, learning_rate=1e-3, gradient_penalty=0))
    ours = DDIMPipeline.from_pretrained(tmp_path / "ours").unet

    args = parse_args(flags(tmp_path, "theirs", gradient_penalty=0))
    unet = DDPMPipeline.from_pretrained(tmp_path / "ddpm").unet.eval()
    torch.manual_seed(3)
    np.random.seed(3)
    critic, value = Critic(1, 16, 4), Value(256, 3, 16)
    adam = [torch.optim.Adam(net.parameters(), 1e-4) for net in (critic, value)]
    policy = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=0.0)
    pictures, bar = load_dataset(args, annotations=()), DDIMScheduler().alphas_cumprod
    levels = [bar[999], bar[666], bar[332]]  # where the network is asked, and where steps lead
    ends = [bar[666], bar[333], torch.tensor(1.0)]

    def law(x, k):
        a, b = levels[k], ends[k]
        eps = unet(x, (999, 666, 332)[k]).sample
        variance = (1 - b) / (1 - a) * (1 - a / b)
        mean = (b / a).sqrt() * x + ((1 - b - variance).clamp_min(0).sqrt() - ((1 - a) * b / a).sqrt()) * eps
        return torch.distributions.Normal(mean, variance.sqrt() if k < 2 else torch.tensor(0.05))

    for turn in range(2):
        buffer = {place: [] for place in range(4)}
        for batch in (2 * turn, 2 * turn + 1):
            noise = SampleNoise(_DRAWN ^ 3, torch.arange(4) + 4 * batch)
            rows = noise.integers(8).tolist()
            real = collate([pictures[row, 0] for row in rows])["pixel_values"]
            xs = [noise.normal(1, 16, 16)]
            for k in range(3):
                with torch.no_grad():
                    found = law(xs[-1], k)
                    xs.append(found.mean + found.stddev * noise.normal(1, 16, 16))
            for place in range(4):
                buffer[place] += [(xs[k][place], xs[k + 1][place], k, xs[-1][place]) for k in range(3)]
            loss = critic(real).mean() - critic(xs[-1]).mean()
            adam[0].zero_grad()
            loss.backward()
            adam[0].step()
            cost = critic(xs[-1]).detach()
            loss = 3 * torch.cat([value(xs[k], torch.full((4,), k)) - cost for k in range(3)]).square().mean()
            adam[1].zero_grad()
            loss.backward()
            adam[1].step()
        for at in range(3 if turn == 0 else 1):
            losses = []
            for place in range(4):
                order = torch.randperm(6, generator=generator_for(_ORDER ^ 3, 4 * turn + place))
                x, after, k, end = buffer[place][order[at]]
                advantage = (critic(end[None]) - value(x[None], torch.tensor([k]))).detach()
                losses.append(advantage * law(x[None], k).log_prob(after[None]).mean())
            policy.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.1)
            policy.step()
    for (name, one), other in zip(ours.named_parameters(), unet.named_parameters(), strict=True):
        assert (one - other[1]).abs().max() < 1e-4, name


@exact
def test_the_penalty_is_of_the_slope(tmp_path):
    task = SFTTask(parse_args(flags(tmp_path, "out", gradient_penalty=2)))
    task.rounds.critic.forward = lambda x: 3 * x.flatten(1)[:, 0]
    real, drawn = torch.ones(4, 1, 16, 16), torch.zeros(4, 1, 16, 16)
    assert task.critic_loss(real, drawn, torch.rand(4, 1, 1, 1)).item() == pytest.approx(3 + 2 * (3 - 1) ** 2)


@exact
@pytest.mark.parametrize(
    ("flag", "value"),
    [("n_critic", 0), ("n_generator", 7), ("last_std", 0), ("gradient_penalty", -1), ("gradient_accumulation_steps", 2),
     ("num_inference_steps", 0), ("value_learning_rate", "inf")],
)  # fmt: skip
def test_bad_arguments_are_refused(flag, value, tmp_path):
    with pytest.raises(ValueError, match=f"`--{flag}` is"):
        parse_args([*flags(tmp_path, "out"), f"--{flag}", str(value)])


@exact
def test_other_predictions_are_refused(tmp_path):
    args = parse_args(flags(tmp_path, "out"))
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "ddpm" / "scheduler")
    with pytest.raises(ValueError, match="predicts 'v_prediction'"):
        SFTTask(args)


# --- reference -------------------------------------------------------------------------------------------------------


def golden_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x + 0.3 * torch.sin(3 * x + t.to(x).reshape(-1, 1, 1, 1) / 150)


def golden_states(number: int) -> list[torch.Tensor]:
    """A sample and one that follows it, for each of `number` steps."""
    wave = torch.arange(2 * number * 8, dtype=torch.float32)
    return list(torch.sin(1.3 * wave + 1).reshape(number, 2, 2, 1, 2, 2))


@pytest.mark.proof("reference")
def test_levels_that_are_whole_timesteps_give_the_authors_steps_and_densities():
    """Their levels are between timesteps; at each of them the formulas are ours with that level in the schedule."""
    wanted = json.loads(GOLDEN.read_text())
    levels, times = torch.tensor(wanted["levels"], dtype=torch.float64), wanted["times"]
    steps = len(times)
    scheduler = DDIMScheduler(num_train_timesteps=steps, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = levels
    for k, (x, after) in enumerate(golden_states(steps)):
        t = steps - 1 - k
        epsilon = golden_network(x, torch.full((2,), times[k]))
        mean, std = transition(scheduler, epsilon, torch.full((2,), t), x, 0.001)
        assert std.flatten().tolist() == pytest.approx([wanted["stds"][k]] * 2, rel=2e-3)
        assert mean.flatten().tolist() == pytest.approx(wanted["means"][k], rel=1e-3, abs=1e-4)
        if k < steps - 1:  # the density of the last step is of a width of 0.001, and rounding decides
            found = log_density(mean, std, after).flatten(1).mean(1)
            assert found.tolist() == pytest.approx(wanted["log_probs"][k], rel=5e-3)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_run_resumed_within_a_round_is_bit_equal(tmp_path):
    """The runs of the round, critic, value and their optimizers are in the checkpoint."""
    main(flags(tmp_path, "straight", max_train_steps=5, learning_rate=1e-3))
    main(flags(tmp_path, "resumed", max_train_steps=2, learning_rate=1e-3, checkpointing_steps=2))
    main(flags(tmp_path, "resumed", max_train_steps=5, learning_rate=1e-3, resume_from_checkpoint="latest"))
    one, other = (DDIMPipeline.from_pretrained(tmp_path / name) for name in ("straight", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True))
    picture = one(1, [generator_for(0, 0)], eta=1.0, num_inference_steps=3, output_type="np").images
    assert picture.shape == (1, 16, 16, 1) and np.isfinite(picture).all()
    assert "DDIMPipeline" in (tmp_path / "straight" / "README.md").read_text()


@exact
def test_checkpoints_hold_the_runs_of_all_processes_and_each_takes_its_own():
    parts = torch.randn(2, 2, 2, 4, 1, 8, 8).unbind()  # 2 places each
    for number, mine in enumerate(parts):
        rounds = _Rounds(Critic(1, 8, 4), Value(64, 3, 16), (1e-4, 1e-4))
        rounds.accelerator = SimpleNamespace(
            num_processes=2, process_index=number, device=mine.device,
            gather=lambda value, parts=parts, mine=mine: torch.cat(parts) if value is mine else value,
        )  # fmt: skip
        rounds.states = mine
        state = rounds.state_dict()
        rounds.states = torch.zeros(0)
        rounds.load_state_dict(state)
        assert torch.equal(rounds.states, mine)


@pytest.mark.proof("loads")
@pytest.mark.slow
def test_two_processes_resumed_within_a_round_are_bit_equal(tmp_path):
    trainer, more = "diffusers_ext.training.train_sft_pg", {"train_batch_size": 2, "learning_rate": 1e-3}
    more |= {"max_train_steps": 3, "checkpointing_steps": 2}
    launch(trainer, *flags(tmp_path, "straight", **more), processes=2)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    launch(trainer, *flags(tmp_path, "resumed", **more, resume_from_checkpoint="latest"), processes=2)
    one, other = (DDIMPipeline.from_pretrained(tmp_path / name).unet for name in ("straight", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, names = run_card("sft_pg")
    assert names["image"].size == (28, 28)
    assert "2301.13362" in card


@pytest.mark.proof("exact")
@pytest.mark.parametrize("steps", [2, 6, 7, 10, 15, 24])
def test_the_last_step_has_the_std_that_was_asked_for(steps):
    """Also where trailing spacing ends at a timestep from which one step more does not lead below zero."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    sample = torch.zeros(steps, 1, 2, 2)
    _, std = transition(scheduler, sample, scheduler.timesteps, sample, last_std=0.05)
    assert std.flatten()[-1] == pytest.approx(0.05) and (std.flatten()[:-1] != 0.05).all()
