"""Solvers with heavy-ball momentum, by the five proofs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

import diffusers_ext as dx
from diffusers_ext.oracles import GaussianMixtureDenoiser, convergence_order
from tests.common.suite import CommonCase

COMMON = CommonCase(
    settings=[
        {"order": 3.5}, {"order": 2, "momentum": "nesterov"}, {"order": 2.7, "momentum": "heavy_ball"}, {"beta": 0.6},
        {"solver_order": 3},
    ]
)  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "ghvb_momentum.json"
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ADAMS_BASHFORTH = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
MOMENTA = ("generalized", "heavy_ball", "nesterov")

exact = pytest.mark.proof("exact")


def start(dtype=torch.float64) -> torch.Tensor:
    return (1.2 * torch.sin(torch.arange(2 * 3 * 4 * 4, dtype=torch.float64) * 1.3)).reshape(2, 3, 4, 4).to(dtype)


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """Noise, by formula."""
    return torch.tanh(0.7 * x + float(t) / 1000) + 0.2 * torch.sin(2 * x)


def states(scheduler, x: torch.Tensor, predict=network) -> list[torch.Tensor]:
    """The states of a run whose timesteps are laid."""
    seen = [x]
    for t in scheduler.timesteps:
        seen.append(scheduler.step(predict(seen[-1], t), t, seen[-1]).prev_sample)
    return seen


def uniform(scheduler, number: int, high: float = 8.0):
    """`number` steps of equal length in sigma / alpha, the last one to clean data."""
    scheduler.set_timesteps(sigmas=[high * (number - i) / number for i in range(number)])
    return scheduler


# --- exact: GHVB, heavy ball and Nesterov on linear multistep --------------------------------------------------------


def textbook(points, x, order: int, beta: float, momentum: str, predictions) -> torch.Tensor:
    """The update formulas as the paper writes them, term by term, with the tables of coefficients."""
    b, history, v = beta, [], None
    generalized = {
        1: [b],
        2: [(2 + b) / 2, -(2 - b) / 2],
        3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
        4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    }
    for here, there, predict in zip(points, points[1:], predictions, strict=False):
        e = predict(x)
        v = e if v is None else v
        if momentum == "generalized":
            v = (1 - b) * v + b * e
            history = [v, *history][:order]
            u = sum(c * old for c, old in zip(generalized[len(history)], history, strict=True)) / b
        else:
            history = [e, *history][:order]
            p = sum(c * old for c, old in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
            v = (1 - b) * v + b * p
            u = v if momentum == "heavy_ball" else (1 - b) * v + b * p
        y = x / here.alpha + (there.sigma / there.alpha - here.sigma / here.alpha) * u
        x = there.alpha * y
    return x


@exact
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("order", [0.6, 1, 1.8, 2, 2.5, 3, 3.7, 4])
def test_it_is_the_formulas_of_the_paper(order, momentum):
    scheduler = dx.GHVBScheduler(order=order, momentum=momentum, **BASE)
    scheduler.set_timesteps(12)
    k = -int(-order // 1)
    calls = [lambda x, t=t: network(x, t) for t in scheduler.timesteps]
    expected = textbook(scheduler.points, start(), k, order - k + 1, momentum, calls)
    torch.testing.assert_close(states(scheduler, start())[-1], expected, rtol=1e-10, atol=1e-10)


@exact
@pytest.mark.parametrize("number", [1, 7, 50])
def test_order_1_is_ddim(number):
    scheduler = dx.GHVBScheduler(order=1, **BASE)
    stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False, **BASE)
    stock.set_timesteps(number)
    gap = 1000 // number
    times = stock.timesteps.tolist()
    x, y = start(), start()
    if number == 7:  # DDIM takes steps of whole timesteps; here they add up
        times = [1000 - gap * (i + 1) for i in range(number)]
        stock.timesteps = torch.tensor(times)
    scheduler.set_timesteps(timesteps=times)
    for i, t in enumerate(times):
        x = scheduler.step(network(x, t), t, x).prev_sample
        if i + 1 < number:  # and end elsewhere
            y = stock.step(network(y, t), t, y).prev_sample
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@exact
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_whole_orders_have_no_momentum(k, momentum):
    plms = states(uniform(dx.GHVBScheduler(order=k, **BASE), 20), start())
    found = states(uniform(dx.GHVBScheduler(order=float(k), momentum=momentum, **BASE), 20), start())
    assert all(torch.equal(a, b) for a, b in zip(plms, found, strict=True))
    assert not torch.allclose(plms[-1], states(uniform(dx.GHVBScheduler(order=k - 0.3), 20), start())[-1], atol=1e-3)


@exact
@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_generalized_is_exact_for_polynomials_once_it_has_settled(k, beta):
    """Predictions that are a polynomial of degree k - 1 in the number of the step are integrated exactly; of degree k not."""
    number = 260
    scheduler = uniform(dx.GHVBScheduler(order=k - 1 + beta, **BASE), number)
    for degree in range(k + 1):
        coefficients = [(-0.7) ** j / (j + 1) for j in range(degree + 1)]
        x = torch.zeros(1, dtype=torch.float64)
        uniform(scheduler, number)
        worst = 0.0
        for i, t in enumerate(scheduler.timesteps):
            s = i / number
            before = x / scheduler.points[i].alpha
            x = scheduler.step(torch.full((1,), sum(c * s**j for j, c in enumerate(coefficients)), dtype=torch.float64), t, x).prev_sample  # fmt: skip
            end = s + 1 / number
            moved = -8.0 * sum(c * (end ** (j + 1) - s ** (j + 1)) / (j + 1) for j, c in enumerate(coefficients))
            if i > 200:
                worst = max(worst, abs(float(x / scheduler.points[i + 1].alpha - before) - moved))
        assert (worst < 1e-12) == (degree < k), f"degree {degree}: {worst}"


def growth(scheduler, z: float, number: int = 400) -> float:
    """Factor a step by which the solution of `dy/ds = c y` grows, with `z = c` times the (negative) length of a step."""
    uniform(scheduler, number)
    rate = -z * number / 8.0
    x = scheduler.points[0].alpha * torch.ones(1, dtype=torch.float64)
    sizes = []
    for i, t in enumerate(scheduler.timesteps[: number - 50]):
        x = scheduler.step(rate * x / scheduler.points[i].alpha, t, x).prev_sample
        sizes.append(abs(float(x / scheduler.points[i + 1].alpha)))
    return (max(sizes[-10:]) / max(sizes[190:200])) ** (1 / (len(sizes) - 200))


@exact
@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8, 1.0])
def test_real_stability_intervals(beta):
    """Heavy ball on Euler is stable on (-2 (2 - b) / b, 0), and generalised heavy ball with k = 2 on (-(2 - b), 0)."""
    for order, end in ((beta, -2 * (2 - beta) / beta), (1 + beta, -(2 - beta))):
        scheduler = dx.GHVBScheduler(order=order, **BASE)
        assert growth(scheduler, 0.98 * end) < 1 < growth(scheduler, 1.02 * end), (order, end)
        assert growth(scheduler, 0.05 * end) < 1


@exact
def test_orders_of_convergence_on_a_uniform_grid():
    """On an exact score, by what the paper proves: heavy ball is of order 1, generalised heavy ball of order k."""
    generator = torch.Generator().manual_seed(0)
    stock = DDIMScheduler(**BASE)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser.from_components(means, 0.3, stock)
    x = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    high, low, numbers = 6.0, 1.5, (24, 72)

    def error(scheduler, number):
        """From sigma / alpha 6 to 1.5."""
        levels = [high + (low - high) * i / number for i in range(number)]
        scheduler.set_timesteps(sigmas=[*levels, low])
        times = scheduler._time_at(torch.tensor([high, low]).numpy())  # in full precision
        expected = denoiser.exact_ode_solution(x, float(times[0]), float(times[1]))
        y, all_times = x, scheduler._time_at(torch.tensor([*levels], dtype=torch.float64).numpy())
        for t, shown in zip(all_times, scheduler.timesteps, strict=False):
            y = scheduler.step(denoiser(y, float(t)).sample, shown, y).prev_sample
        return float((y - expected).square().mean().sqrt())

    for order, momentum, wanted in (
        (1.8, "generalized", 2), (2, "generalized", 2), (1.8, "heavy_ball", 1), (2.5, "heavy_ball", 1), (3.5, "heavy_ball", 1),
        (1, "generalized", 1),
    ):  # fmt: skip
        errors = [error(dx.GHVBScheduler(order=order, momentum=momentum, **BASE), number) for number in numbers]
        assert convergence_order(errors, numbers) == pytest.approx(wanted, abs=0.25), (order, momentum, errors)


# --- exact: heavy ball on DPM-Solver++ and UniPC ---------------------------------------------------------------------

GRIDS = ({}, {"final_sigmas_type": "sigma_min"}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"})


@exact
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("number", [1, 2, 5, 10, 30])
def test_beta_1_is_upstreams_solver(number, grid):
    options = {**BASE, **grid}
    for ours, theirs in (
        (dx.HeavyBallDPMSolverMultistepScheduler(beta=1, **options), DPMSolverMultistepScheduler(**options)),
        (dx.HeavyBallUniPCMultistepScheduler(beta=1, **options), UniPCMultistepScheduler(**options)),
        (
            dx.HeavyBallUniPCMultistepScheduler(beta=1, solver_order=3, disable_corrector=[0, 2], **options),
            UniPCMultistepScheduler(solver_order=3, disable_corrector=[0, 2], **options),
        ),
    ):
        ours.set_timesteps(number), theirs.set_timesteps(number)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        found, wanted = states(ours, start())[-1], states(theirs, start())[-1]
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)  # upstream's coefficients are float32


class UpstreamWithMomentum(UniPCMultistepScheduler):
    """Slow derivation: what upstream's predictor and corrector move along, read off their results and averaged."""

    def restart(self, beta):
        self.beta, self.velocities = beta, {}

    def move(self, name, plain, x, begin, end):
        ends = [self._sigma_to_alpha_sigma_t(self.sigmas[i].double()) for i in (begin, end)]
        (a0, s0), (a1, s1) = ends
        if s1 == 0:
            return plain
        state, total = s1 / s0, a1 - s1 / s0 * a0
        direction = (plain - state * x) / total
        old = self.velocities.get(name, direction)
        self.velocities[name] = (1 - self.beta) * old + self.beta * direction
        return state * x + total * self.velocities[name]

    def multistep_uni_p_bh_update(self, model_output, sample=None, order=None):
        plain = super().multistep_uni_p_bh_update(model_output, sample=sample, order=order)
        return self.move("predictor", plain, sample, self.step_index, self.step_index + 1)

    def multistep_uni_c_bh_update(self, this_model_output, last_sample=None, this_sample=None, order=None):
        plain = super().multistep_uni_c_bh_update(
            this_model_output, last_sample=last_sample, this_sample=this_sample, order=order
        )
        return self.move("corrector", plain, last_sample, self.step_index - 1, self.step_index)


@exact
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_unipc_with_momentum_is_the_average_of_what_upstream_moves_along(solver_order):
    for grid in GRIDS[:3]:
        slow = UpstreamWithMomentum(solver_order=solver_order, **BASE, **grid)
        slow.restart(0.7)
        ours = dx.HeavyBallUniPCMultistepScheduler(beta=0.7, solver_order=solver_order, **BASE, **grid)
        slow.set_timesteps(9), ours.set_timesteps(9)
        torch.testing.assert_close(
            states(ours, start())[-1], states(slow, start())[-1], rtol=1e-4, atol=1e-4
        )  # upstream's coefficients are float32, and a small difference is divided by a small number


@exact
def test_dpm_solver_with_momentum_is_its_formula():
    scheduler = dx.HeavyBallDPMSolverMultistepScheduler(beta=0.7, **BASE)
    scheduler.set_timesteps(9)
    x, kept, v, points = start(), None, None, scheduler.points
    for i, t in enumerate(scheduler.timesteps):
        (a0, s0), (a1, s1) = points[i], points[i + 1]
        m = (x - s0 * network(x, t)) / a0
        if kept is None or i == 8:
            x = (s1 / s0) * x + (a1 - s1 / s0 * a0) * m
        else:
            h, before = points[i + 1].lambda_ - points[i].lambda_, points[i].lambda_ - points[i - 1].lambda_
            d = m + 0.5 * h / before * (m - kept)
            v = d if v is None else 0.3 * v + 0.7 * d
            x = (s1 / s0) * x - a1 * (torch.exp(torch.tensor(-h, dtype=torch.float64)) - 1) * v
        kept = m
    torch.testing.assert_close(states(scheduler, start())[-1], x, rtol=1e-10, atol=1e-10)


@exact
@pytest.mark.parametrize("name", ["HeavyBallDPMSolverMultistepScheduler", "HeavyBallUniPCMultistepScheduler"])
def test_data_that_are_one_point_are_reached_exactly(name):
    """The average of equal predictions is that prediction. Divided by sigma, as in the authors' UniPC, it falls behind."""
    point = torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(2, 3, 4, 4)
    for final in ("zero", "sigma_min"):
        scheduler = getattr(dx, name)(beta=0.6, final_sigmas_type=final, prediction_type="sample", **BASE)
        scheduler.set_timesteps(8)
        noise = start()
        alpha, sigma = scheduler.points[0]
        found = states(scheduler, alpha * point + sigma * noise, lambda x, t: point)[-1]
        alpha, sigma = scheduler.points[-1]
        torch.testing.assert_close(found, alpha * point + sigma * noise, rtol=1e-12, atol=1e-12)


@exact
def test_momentum_keeps_a_stiff_problem_in_bounds():
    """Where the exact solution decays, PLMS of order 4 explodes at 10 steps, and 1.5 does not: what the paper is about."""

    def largest(order):
        scheduler = uniform(dx.GHVBScheduler(order=order, **BASE), 10)
        i = iter(range(10))

        def stiff(x, t):
            return 1.6 * x / scheduler.points[next(i)].alpha

        return float(states(scheduler, start() * scheduler.points[0].alpha, stiff)[-1].abs().max())

    assert largest(4) > 10 > 3 > largest(1.5)


# --- reference -------------------------------------------------------------------------------------------------------

TIMES = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]  # of DDIM with 10 steps
LINEAR = [
    ("PLMSWithHBScheduler", "heavy_ball", 1.8), ("PLMSWithHBScheduler", "heavy_ball", 3.7), ("GHVBScheduler", "generalized", 0.7),
    ("GHVBScheduler", "generalized", 1.8), ("GHVBScheduler", "generalized", 2.3), ("GHVBScheduler", "generalized", 3.5),
    ("GHVBScheduler", "generalized", 4.0), ("PLMSWithNTScheduler", "nesterov", 2.4),
]  # fmt: skip


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


@pytest.mark.proof("reference")
@pytest.mark.parametrize(("name", "momentum", "order"), LINEAR)
def test_linear_multistep_agrees_with_the_authors_code(name, momentum, order):
    scheduler = dx.GHVBScheduler(order=order, momentum=momentum, **BASE)
    scheduler.set_timesteps(timesteps=TIMES)
    found = [numbers(x) for x in states(scheduler, start())]
    wanted = json.loads(GOLDEN.read_text())["linear"][f"{name} {order}"]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6)  # their coefficients are float32


@pytest.mark.proof("reference")
@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5])
def test_dpm_solver_agrees_with_the_authors_code(beta):
    """Their UniPC is not compared: its predictor writes the plain direction over the averaged one, and its corrector
    averages directions divided by sigma. At beta 1 theirs is upstream's, which ours is compared with above."""
    options = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    scheduler = dx.HeavyBallDPMSolverMultistepScheduler(beta=beta, **options, **BASE)
    scheduler.set_timesteps(timesteps=TIMES[:-1])
    found = [numbers(x) for x in states(scheduler, start())]
    wanted = json.loads(GOLDEN.read_text())["dpm_solver"][str(beta)]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_it_takes_the_config_of_a_stock_pipeline_and_comes_back(avatars_sd, tmp_path):
    config = avatars_sd.scheduler.config
    for made in (
        dx.GHVBScheduler.from_config(config, order=2.5, momentum="nesterov"),
        dx.HeavyBallDPMSolverMultistepScheduler.from_config(config, beta=0.7),
        dx.HeavyBallUniPCMultistepScheduler.from_config(config, beta=0.7, disable_corrector=[0]),
    ):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        again = type(made).from_pretrained(folder)
        made.set_timesteps(6), again.set_timesteps(6)
        assert (
            made.timesteps[-1] > 0 and type(made).order == 1
        )  # the grid of Stable Diffusion; stock loops count by `order`
        assert torch.equal(states(made, start())[-1], states(again, start())[-1])


@exact
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("GHVBScheduler", {"order": 0}), ("GHVBScheduler", {"order": 4.1}), ("GHVBScheduler", {"order": True}),
     ("GHVBScheduler", {"momentum": "polyak"}), ("HeavyBallDPMSolverMultistepScheduler", {"beta": 0}),
     ("HeavyBallUniPCMultistepScheduler", {"beta": 1.1}), ("HeavyBallUniPCMultistepScheduler", {"solver_order": 4}),
     ("HeavyBallUniPCMultistepScheduler", {"disable_corrector": 0})],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(name, wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
        getattr(dx, name)(**wrong)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe):
    from diffusers_ext.cards import method_card

    card = method_card("ghvb_momentum")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {"pipe": pipe})
    assert "2307.11118" in card
