"""What every scheduler must do.

It is a `SchedulerMixin, ConfigMixin` that drops into unmodified diffusers pipelines with `from_config`. The rules below
run it by itself, on a data set of which everything is known, and inside the stock pipelines of its process.

`COMMON` of a scheduler (all optional): `settings` of its class; `extras`, a function that gives what `from_config` takes
beside the config (`{"statistics": ...}`); `process`, where the arguments of the class do not tell it:

- "diffusion": the beta schedule of diffusers (`beta_start`, `beta_end`, `beta_schedule`), or "both" with flow;
- "flow": rectified flow, `x = (1 - sigma) x0 + sigma noise` and timestep `sigma * num_train_timesteps`;
- "other": something else. Then `inputs(scheduler, num_steps, dtype, generator)` runs a whole sampling loop and returns the
  result, and the rules about the process and the stock pipelines are left out.

The known data set is a Gaussian N(MEAN, STD^2) in each element. Its optimal prediction and the solution of the
probability-flow equation are linear: z = (x_t - a m) / sqrt(a^2 s^2 + b^2) stays the same for x_t = a x0 + b noise.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin

from . import arguments, models
from .journey import Parcel, pack_pipeline
from .models import Stock, World
from .suite import Case, Suite, refused, require

MEAN, STD = 0.3, 0.5
SHAPE = (4, 3, 16, 16)
SMALL = (2, 3, 4, 4)
STEPS = (1, 2, 3, 5, 8, 10, 50, 1000)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # of schedulers that do diffusion and flow
_OURS = "diffusers_ext"

SUITE = Suite(
    "scheduler",
    "a class derived from SchedulerMixin and ConfigMixin",
    lambda entry: isinstance(entry, type) and issubclass(entry, SchedulerMixin) and issubclass(entry, ConfigMixin),
)


# --- building and running --------------------------------------------------------------------------------------------


def processes(case: Case) -> tuple[str, ...]:
    """Processes that the scheduler is for: what it told, or what its arguments tell."""
    if case.common.process is not None:
        return ("diffusion", "flow") if case.common.process == "both" else (case.common.process,)
    names = arguments.arguments(case.cls)
    if "use_flow_sigmas" in names:
        return ("diffusion", "flow")
    if "beta_start" in names:
        return ("diffusion",)
    return ("flow",) if "shift" in names else ()


def is_known(case: Case) -> bool:
    """Whether its process is one of those that the rules have an exact answer for."""
    return bool({"diffusion", "flow"} & set(processes(case)))


def extras(case: Case) -> dict[str, Any]:
    return dict(case.common.extras()) if case.common.extras is not None else {}


def build(case: Case, **settings: Any) -> Any:
    made = case.cls(**settings)
    return case.cls.from_config(made.config, **extras(case)) if case.common.extras is not None else made


def builds(case: Case) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """`(label, process, function that builds a new one)` for all settings, prediction types and processes."""
    names = arguments.arguments(case.cls)
    for settings in case.settings:
        for process in processes(case):
            variants = [{}]
            if process == "flow" and FLOW.keys() <= names.keys():
                variants = [FLOW]
            elif process == "diffusion" and "prediction_type" in names and "prediction_type" not in settings:
                variants += [{"prediction_type": kind} for kind in ("v_prediction", "sample")]
            for variant in variants:
                given = {**settings, **variant}
                try:
                    made = build(case, **given)
                    if not case.own and process != "other":  # some of diffusers' say no in the first step only
                        sample(made, process, some_steps(made), stop_after=1)
                except Exception:
                    if not variant or process == "flow":
                        raise
                    continue
                label = ", ".join(f"{key}={value!r}" for key, value in given.items()) or "defaults"
                yield label, process, functools.partial(build, case, **given)


def first_builds(case: Case) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """One of `builds` a process: for rules that do not depend on settings."""
    seen = set()
    for label, process, make in builds(case):
        if process not in seen:
            seen.add(process)
            yield label, process, make


def taken(function: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
    """Those of `kwargs` that a function names."""
    return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}


def scaled(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def first_noise(scheduler: Any, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise * float(getattr(scheduler, "init_noise_sigma", 1.0))


@functools.cache
def _sqrt_alphas(start: float, end: float, schedule: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(a, b)` with `x_t = a x0 + b noise` by timestep, of the stock scheduler that models are trained with."""
    stock = DDPMScheduler(beta_start=start, beta_end=end, beta_schedule=schedule, num_train_timesteps=number)
    return stock.alphas_cumprod.double().sqrt(), (1 - stock.alphas_cumprod.double()).sqrt()


def coefficients(scheduler: Any, process: str, t: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(a, b)` with `x_t = a x0 + b noise`, at any real timestep; what the model that is sampled from was trained with."""
    config = scheduler.config
    t = torch.as_tensor(t).double()
    if process == "flow":
        sigma = t / config.num_train_timesteps
        return 1 - sigma, sigma
    a, b = _sqrt_alphas(config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps)
    below = t.floor().long().clamp(0, len(a) - 1)
    above = (below + 1).clamp(max=len(a) - 1)
    ratio = torch.lerp((b / a).log()[below], (b / a).log()[above], t - below).exp()  # log-linear in between
    return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()


def prediction(scheduler: Any, process: str, x: torch.Tensor, t: Any) -> torch.Tensor:
    """What a perfect model of the Gaussian predicts for its input `x`, in the scheduler's prediction type."""
    a, b = coefficients(scheduler, process, t)
    centred = (x.double() - a * MEAN) / (a**2 * STD**2 + b**2)
    x0, noise = MEAN + a * STD**2 * centred, b * centred
    kind = scheduler.config.get("prediction_type", "epsilon")
    if process == "flow":
        result = noise - x0
    else:
        result = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - b * x0}[kind]
    return result.to(x.dtype)


def standard(scheduler: Any, process: str, x: torch.Tensor, t: Any) -> torch.Tensor:
    """z, which the exact solution leaves as it is, of a state at timestep `t`."""
    a, b = coefficients(scheduler, process, t)
    return (scaled(scheduler, x, t).double() - a * MEAN) / (a**2 * STD**2 + b**2).sqrt()


def step_kwargs(scheduler: Any, seed: int) -> dict[str, Any]:
    return taken(scheduler.step, generator=torch.Generator().manual_seed(seed))


def sample(
    scheduler: Any,
    process: str,
    num_steps: int,
    seed: int = 0,
    shape: tuple[int, ...] = SMALL,
    dtype: torch.dtype = torch.float32,
    x: torch.Tensor | None = None,
    begin: int = 0,
    stop_after: int | None = None,
) -> torch.Tensor:
    """A stock sampling loop with the perfect model: from noise, or from `x` at timestep number `begin`."""
    return list(steps(scheduler, process, num_steps, seed, shape, dtype, x, begin, stop_after))[-1]


def steps(
    scheduler: Any,
    process: str,
    num_steps: int,
    seed: int = 0,
    shape: tuple[int, ...] = SMALL,
    dtype: torch.dtype = torch.float32,
    x: torch.Tensor | None = None,
    begin: int = 0,
    stop_after: int | None = None,
) -> Iterator[torch.Tensor]:
    """As `sample`, the state after each step."""
    scheduler.set_timesteps(num_steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    kwargs = step_kwargs(scheduler, seed + 1)
    x = (first_noise(scheduler, shape, seed) if x is None else x).to(dtype)
    yield x
    for number, t in enumerate(scheduler.timesteps[begin:]):
        if number == stop_after:
            return
        output = prediction(scheduler, process, scaled(scheduler, x, t), t)
        x = scheduler.step(output, t, x, **kwargs, return_dict=False)[0]
        yield x


def is_random(make: Callable[[], Any], process: str) -> bool:
    """Whether its steps draw noise."""
    number, noise = some_steps(make()), first_noise(make(), SMALL, 0)
    return not torch.equal(sample(make(), process, number, 0, x=noise), sample(make(), process, number, 7, x=noise))


def some_steps(scheduler: Any) -> int:
    """10, or the nearest number of steps that it allows."""
    for number in (10, *STEPS):
        try:
            scheduler.set_timesteps(number)
        except ValueError:
            continue
        return number
    raise AssertionError(f"`set_timesteps` takes none of {STEPS}")


# --- interface and config --------------------------------------------------------------------------------------------


@SUITE.rule()
def interface(case: Case, world: World) -> None:
    """It has the attributes and methods that stock pipelines use.

    `order`, `init_noise_sigma`, `timesteps`, `set_timesteps(num_inference_steps, device)`, `step(model_output, timestep,
    sample, generator, return_dict)`, `scale_model_input`, `add_noise` or `scale_noise`, `set_begin_index`; for flow also
    `set_timesteps(sigmas, mu)`. No `**kwargs` and no private argument in the constructor: both get lost on loading.
    """
    wanted = {
        "set_timesteps": ["num_inference_steps", "device"],
        "step": ["model_output", "timestep", "sample", "return_dict"],
    }
    if case.own:
        wanted["step"].append("generator")
        if processes(case) == ("flow",):
            wanted["set_timesteps"] += ["sigmas", "mu"]
    scheduler = build(case, **case.settings[0])
    for method, names in wanted.items():
        parameters = inspect.signature(getattr(scheduler, method)).parameters
        missing = [name for name in names if name not in parameters]
        require(not missing, f"`{method}` does not take {missing}")
    require(isinstance(scheduler.order, int) and scheduler.order >= 1, f"`order` is {scheduler.order!r}")
    needed = ["timesteps"]
    if is_known(case) and case.own:
        needed += ["set_begin_index", "add_noise" if "diffusion" in processes(case) else "scale_noise"]
    if "diffusion" in processes(case):
        needed += ["init_noise_sigma", "scale_model_input"]
    for name in needed:
        require(hasattr(scheduler, name), f"it has no `{name}`")
    if case.own:
        for name, parameter in inspect.signature(case.cls).parameters.items():
            kind = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and not name.startswith("_")
            require(kind, f"its constructor has `{parameter}`")


@SUITE.rule()
def process(case: Case, world: World) -> None:
    """It is known which process it samples.

    Where its arguments do not tell (`beta_start`: diffusion; `shift`: flow; `use_flow_sigmas`: both), `COMMON` does.
    """
    known = processes(case)
    require(known, 'its arguments do not tell: `COMMON = CommonCase(process="diffusion", "flow", "both" or "other")`')
    allowed = {"diffusion", "flow", "other"}
    require(set(known) <= allowed, f"`process` is {case.common.process!r}; allowed are 'both' and {sorted(allowed)}")
    if known == ("other",) and case.own:
        require(case.common.inputs, "`process` is 'other': `COMMON` needs `inputs`, which runs a sampling loop")


@SUITE.rule(own=True)
def loadable_name(case: Case, world: World) -> None:
    """diffusers' loader finds its class by the name that is written into `model_index.json`."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    library = case.cls.__module__.partition(".")[0]
    found = _fetch_class_library_tuple(case.cls)
    require(
        found == (library, case.cls.__name__),
        f"diffusers writes {found}; name no folder like one of diffusers.pipelines",
    )


def contents(scheduler: Any) -> dict[str, Any]:
    """Tensors, arrays and numbers of a scheduler, also after `set_timesteps`."""
    scheduler = copy.deepcopy(scheduler)
    kinds = (torch.Tensor, np.ndarray, int, float)
    result = {key: value for key, value in vars(scheduler).items() if isinstance(value, kinds)}
    try:
        scheduler.set_timesteps(10)
    except Exception as error:  # not with these settings
        return result | {"error of set_timesteps": str(error)}
    return result | {f"{key} after set_timesteps": v for key, v in vars(scheduler).items() if isinstance(v, kinds)}


@SUITE.rule()
def config_round_trip(case: Case, world: World) -> None:
    """Constructor, from_config, save_pretrained and from_pretrained keep every argument and give equal tensors."""
    if case.common.extras is None:
        arguments.check_config_survives(case, world.folder(), contents)
    else:
        arguments.check_config_survives(case, world.folder(), contents, **extras(case))


@SUITE.rule(own=True)
def positional_arguments(case: Case, world: World) -> None:
    """Arguments given by position are refused or survive from_config."""
    for settings in case.settings:
        arguments.check_positional(
            case.cls, settings, arguments.public_config, lambda made: case.cls.from_config(made.config, **extras(case))
        )


@SUITE.rule(own=True)
def wrong_arguments(case: Case, world: World) -> None:
    """A wrong value of a constructor argument is a ValueError that names it."""
    arguments.check_wrong_values(case, case.common.free_text)


@SUITE.rule(own=True)
def wrong_calls(case: Case, world: World) -> None:
    """A wrong number of steps, a step before set_timesteps, and missing extras are ValueErrors that say so."""
    scheduler = build(case, **case.settings[0])
    for number in (0, -1, 2.5, "10"):
        refused(f"set_timesteps({number!r})", scheduler.set_timesteps, number, names=("num_inference_steps",))
    fresh, x = build(case, **case.settings[0]), torch.zeros(SMALL)
    refused("`step` before `set_timesteps`", fresh.step, x, 1, x, names=("set_timesteps",))
    if case.common.extras is not None:
        bare = case.cls(**case.settings[0])
        refused("without extras", bare.set_timesteps, 10, names=tuple(extras(case)))


# --- steps -----------------------------------------------------------------------------------------------------------


@SUITE.rule(when=is_known)
def step_output(case: Case, world: World) -> None:
    """A step returns an object with `prev_sample`, or a tuple, of the kind of the sample, and changes no input."""
    for label, process, make in builds(case):
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for return_dict in (True, False):
                scheduler = make()
                scheduler.set_timesteps(some_steps(scheduler))
                x, t = first_noise(scheduler, SMALL, 0).to(dtype), scheduler.timesteps[0]
                before = x.clone()
                model_input = scaled(scheduler, x, t)
                output = prediction(scheduler, process, model_input, t)
                given = output.clone()
                result = scheduler.step(output, t, x, **step_kwargs(scheduler, 1), return_dict=return_dict)
                require(torch.equal(x, before), f"{label}: `scale_model_input` or `step` writes into the sample")
                require(torch.equal(output, given), f"{label}: `step` writes into the model output")
                kind = "object" if return_dict else "tuple"
                require(isinstance(result, tuple) != return_dict, f"{label}: return_dict={return_dict} gives no {kind}")
                results.append(result.prev_sample if return_dict else result[0])
            for found in results:
                right = found.dtype == dtype and found.shape == x.shape
                require(right, f"{label}: {dtype} {tuple(x.shape)} became {found.dtype} {tuple(found.shape)}")
            require(torch.equal(*results), f"{label}: the tuple holds something else than the object")


@SUITE.rule()
def any_number_of_steps(case: Case, world: World) -> None:
    """From 1 to 1000 steps the result is finite, in float32 and bfloat16; or the number is refused by name."""
    for label, process, make in builds(case):
        worked = []
        for number in STEPS:
            for dtype in (torch.float32, torch.bfloat16):
                if number > 100 and (dtype != torch.float32 or "prediction_type" in label):
                    continue
                try:
                    result = whole_run(case, make(), process, number, dtype)
                except ValueError as error:
                    named = "num_inference_steps" in str(error)
                    require(named or not case.own, f"{label}: {number} steps: {error} (name `num_inference_steps`)")
                    continue
                require(result.dtype == dtype, f"{label}: {number} steps give {result.dtype}, not {dtype}")
                require(result.isfinite().all(), f"{label}: {number} steps in {dtype} are not finite")
                worked.append(number)
        require(worked, f"{label}: it takes none of {STEPS} steps")


def whole_run(case: Case, scheduler: Any, process: str, number: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A sampling loop: with the perfect model, or as `COMMON` says."""
    if process != "other":
        return sample(scheduler, process, number, seed, dtype=dtype)
    if case.common.inputs is None:
        raise ValueError(f"{case.name} has no `inputs` to run it with, for {number} `num_inference_steps`")
    return case.common.inputs(scheduler, number, dtype, torch.Generator().manual_seed(seed))


@SUITE.rule(when=is_known)
def timesteps(case: Case, world: World) -> None:
    """The timesteps fall, lie in the training range and on the device asked for, and callbacks count right with `order`."""
    for label, _, make in first_builds(case):
        scheduler = make()
        number = some_steps(scheduler)
        try:
            scheduler.set_timesteps(number, device="meta")
            require(scheduler.timesteps.device.type == "meta", f"{label}: `device` is not where `timesteps` are")
        except (NotImplementedError, RuntimeError):
            pass  # it reads values, which a tensor without data does not have
        for count in (number, 5):
            scheduler.set_timesteps(count)
            found = scheduler.timesteps
            require(torch.is_tensor(found) and found.ndim == 1, f"{label}: `timesteps` is no one-dimensional tensor")
            require(found.device.type == "cpu", f"{label}: without a device the timesteps are on {found.device}")
            rises = (found.double().diff() > 0).sum().item()
            require(rises < scheduler.order, f"{label}: the timesteps rise {rises} times: {found.tolist()}")
            top = scheduler.config.num_train_timesteps
            require(
                found.min() >= 0 and found.max() <= top, f"{label}: timesteps outside of 0 to {top}: {found.tolist()}"
            )
            warmup = len(found) - count * scheduler.order
            updates = sum(
                i == len(found) - 1 or (i + 1 > warmup and (i + 1) % scheduler.order == 0) for i in range(len(found))
            )
            require(
                updates == count, f"{label}: a stock progress bar counts {updates} of {count} steps with its `order`"
            )


@SUITE.rule(when=is_known)
def first_noise_level(case: Case, world: World) -> None:
    """The model's first input has about unit variance, as in training: `init_noise_sigma` fits the first timestep."""
    for label, _, make in first_builds(case):
        scheduler = make()
        scheduler.set_timesteps(some_steps(scheduler))
        t = scheduler.timesteps[0]
        found = scaled(scheduler, first_noise(scheduler, SHAPE, 0), t).double().square().mean().sqrt().item()
        require(abs(found - 1) < 0.05, f"{label}: the first input of the model has a deviation of {found:.3f}")


def noised(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor | None:
    """`add_noise` or `scale_noise`, at one timestep for the whole batch."""
    t = t.reshape(1).expand(len(x0))
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x0, noise, t)
    return scheduler.scale_noise(x0, t, noise) if hasattr(scheduler, "scale_noise") else None


@SUITE.rule(when=is_known)
def adding_noise(case: Case, world: World) -> None:
    """add_noise (scale_noise) makes what the model was trained on: `a x0 + b noise`, once scale_model_input has scaled it."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(SMALL, generator=generator), torch.randn(SMALL, generator=generator)
    for label, process, make in first_builds(case):
        for number in range(0, 10, 3):
            scheduler = make()
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[number]
            found = noised(scheduler, x0, noise, t)
            if found is None:
                return
            require(found.dtype == x0.dtype and found.shape == x0.shape, f"{label}: it changes dtype or shape")
            a, b = coefficients(scheduler, process, t)
            wanted = a * x0.double() + b * noise.double()
            error = (scaled(scheduler, found, t).double() - wanted).abs().max().item()
            require(error < 5e-3, f"{label}: at timestep {float(t):.1f} it is off by {error:.2g}")


# --- the result ------------------------------------------------------------------------------------------------------


@SUITE.rule(when=is_known)
def gaussian(case: Case, world: World) -> None:
    """On Gaussian data the result converges to the exact solution; with random steps, to the right distribution."""
    for label, process, make in builds(case):
        random = is_random(make, process)
        errors = {}
        for number in (20, 100):
            scheduler = make()
            try:
                scheduler.set_timesteps(number)
            except ValueError:
                continue  # `any_number_of_steps` looks at that
            x = first_noise(scheduler, SHAPE, 0)
            z = standard(scheduler, process, x, scheduler.timesteps[0])
            result = sample(make(), process, number, x=x).double()
            if random:
                errors[number] = max(abs(result.mean().item() - MEAN), abs(result.std().item() - STD)) / STD
            else:
                errors[number] = (result - (MEAN + STD * z)).square().mean().sqrt().item() / STD
        said = ", ".join(f"{error:.3g} with {number} steps" for number, error in errors.items())
        what = "mean and deviation are" if random else "the result is"
        last = list(errors.values())[-1] if errors else 0.0
        require(last < 0.1, f"{label}: {what} off by {said}, in units of the data's deviation")
        if not random and len(errors) == 2:
            require(errors[100] < max(0.6 * errors[20], 0.01), f"{label}: more steps do not help: off by {said}")


@SUITE.rule(when=is_known)
def start_in_the_middle(case: Case, world: World) -> None:
    """Image-to-image: from add_noise at a middle timestep, after set_begin_index, it reaches the same exact solution."""
    generator = torch.Generator().manual_seed(3)
    x0 = MEAN + STD * torch.randn(SHAPE, generator=generator)
    noise = torch.randn(SHAPE, generator=generator)
    for label, process, make in first_builds(case):
        scheduler = make()
        try:
            scheduler.set_timesteps(50)
        except ValueError:
            continue
        begin = len(scheduler.timesteps) // 2
        begin -= begin % scheduler.order
        if not hasattr(scheduler, "set_begin_index") and not case.own:
            continue
        scheduler.set_begin_index(begin)
        t = scheduler.timesteps[begin]
        x = noised(scheduler, x0, noise, t)
        if x is None:
            continue
        z = standard(scheduler, process, x, t)
        result = sample(make(), process, 50, x=x, begin=begin).double()
        require(result.isfinite().all(), f"{label}: not finite")
        if is_random(make, process):
            error = max(abs(result.mean().item() - MEAN), abs(result.std().item() - STD)) / STD
        else:
            error = (result - (MEAN + STD * z)).square().mean().sqrt().item() / STD
        require(
            error < 0.1,
            f"{label}: from timestep {float(t):.0f} the result is off by {error:.3g} of the data's deviation",
        )


# --- state -----------------------------------------------------------------------------------------------------------


@SUITE.rule()
def runs_leave_nothing(case: Case, world: World) -> None:
    """A run is the same after another one, a shorter one, one of another shape, one that began late, one broken off."""
    for label, process, make in builds(case):
        scheduler = make()
        number = some_steps(scheduler)
        expected = whole_run(case, make(), process, number, torch.float32)
        others: dict[str, Callable[[], Any]] = {
            "the first run": lambda: None,
            "a run": lambda s=scheduler, p=process, n=number: whole_run(case, s, p, n, torch.float32, seed=5),
        }
        if process != "other":
            late = {"begin": scheduler.order, "seed": 2}
            others |= {
                "a run broken off": lambda s=scheduler, p=process, n=number: sample(s, p, n, seed=6, stop_after=2),
                "a run of another shape": lambda s=scheduler, p=process, n=number: sample(s, p, n, shape=(1, 3, 8, 8)),
                "a run that began late": lambda s=scheduler, p=process, n=number, k=late: sample(s, p, n, **k),
            }
        for when, other in others.items():
            other()
            found = whole_run(case, scheduler, process, number, torch.float32)
            require(torch.equal(found, expected), f"{label}: after {when} another result")


@SUITE.rule(when=is_known)
def instances_share_nothing(case: Case, world: World) -> None:
    """Two schedulers whose steps alternate, and two in two threads, give what each gives alone."""
    for label, process, make in first_builds(case):
        number = some_steps(make())
        runs = [{"seed": 0}, {"seed": 1, "shape": (3, 3, 4, 4)}]
        expected = [sample(make(), process, number, **run) for run in runs]
        walks = [steps(make(), process, number, **run) for run in runs]
        last: list[Any] = [None, None]
        for states in zip(*walks, strict=True):
            last = list(states)
        for i in (0, 1):
            require(
                torch.equal(last[i], expected[i]), f"{label}: alternating with another, number {i} changes its result"
            )
        results = in_threads([lambda run=run, m=make, p=process, n=number: sample(m(), p, n, **run) for run in runs])
        for i in (0, 1):
            require(torch.equal(results[i], expected[i]), f"{label}: in two threads, number {i} changes its result")


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that run at the same time; raises what one of them raised."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@SUITE.rule(when=is_known)
def deepcopy(case: Case, world: World) -> None:
    """A deep copy in mid-run goes on as the original does, and leaves it alone."""
    for label, process, make in first_builds(case):
        scheduler = make()
        number = some_steps(scheduler)
        if number < 3:
            continue
        expected = sample(make(), process, number)
        x = sample(scheduler, process, number, stop_after=2)
        for clone in (copy.deepcopy(scheduler), scheduler):  # the copy first: it must not move the original on
            y, kwargs = x, step_kwargs(clone, 1)
            if is_random(make, process):
                continue  # the generator belongs to the caller
            for t in clone.timesteps[2:]:
                y = clone.step(prediction(clone, process, scaled(clone, y, t), t), t, y, **kwargs, return_dict=False)[0]
            require(torch.equal(y, expected), f"{label}: copied after two steps, another result")


# --- inside pipelines ------------------------------------------------------------------------------------------------


def put_into(case: Case, stock: Stock, pipe: Any) -> Any:
    """The stock pipeline with the scheduler, made from the config of the stock one."""
    names = arguments.arguments(case.cls).keys()
    changes: dict[str, Any] = dict(FLOW) if stock.process == "flow" and names >= FLOW.keys() else {}
    if changes and not case.own and "use_dynamic_shifting" in names:
        changes["use_dynamic_shifting"] = (
            True  # without it diffusers' own assert that no `mu` comes, and Flux passes it
        )
    pipe.scheduler = case.cls.from_config(pipe.scheduler.config, **changes, **extras(case))
    return pipe


def homes(case: Case, world: World) -> Iterator[Stock]:
    """The stock pipelines that it must work in."""
    for stock in world.stocks(*processes(case)):
        if "ddpm" in stock.name and "generator" not in inspect.signature(case.cls.step).parameters:
            continue  # that pipeline always passes one; `interface` asks it of ours
        yield stock


@SUITE.rule(when=is_known)
def stock_pipelines(case: Case, world: World) -> None:
    """In every stock pipeline of its process: finite, the same twice, right callbacks, no trace of a run broken off."""
    for stock in homes(case, world):
        pipe = put_into(case, stock, world.pipe(stock))
        number = 4
        pipe.progress_bar = updates = models.Updates()
        seen: list[Any] = []
        count = taken(pipe.__call__, callback_on_step_end=lambda _pipe, i, t, kwargs, seen=seen: seen.append(i) or {})
        expected = stock.draw(pipe, number, **count)
        require(expected.isfinite().all(), f"{stock.name}: not finite")
        if count:
            length = len(pipe.scheduler.timesteps)
            require(seen == list(range(length)), f"{stock.name}: callbacks came for steps {seen} of {length}")
            require(updates.count == number, f"{stock.name}: its progress bar shows {updates.count} of {number} steps")
        if stock.zoo:
            continue  # larger; what a run leaves behind shows on the tiny ones
        require(torch.equal(stock.draw(pipe, number), expected), f"{stock.name}: the second call gives another result")
        models.abort(stock, pipe, seed=9)
        require(
            torch.equal(stock.draw(pipe, number), expected), f"{stock.name}: after a run broken off, another result"
        )


@SUITE.rule(when=is_known)
def image_to_image(case: Case, world: World) -> None:
    """Stable Diffusion image-to-image starts late and gives the same before and after a full run."""
    from diffusers import StableDiffusionImg2ImgPipeline

    if "diffusion" not in processes(case):
        return
    stock = models.STOCKS["avatars-sd"]
    pipe = put_into(case, stock, world.pipe(stock))
    late = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    call = {**stock.call(4), "image": image, "strength": 0.5}
    expected = models.draw(late, call)
    require(expected.isfinite().all(), "not finite")
    stock.draw(pipe, 4)
    require(torch.equal(models.draw(late, call), expected), "after a full run, another result")


@SUITE.rule(when=is_known)
def two_pipelines(case: Case, world: World) -> None:
    """Two pipelines in two threads give what each gives alone."""
    stock = min(homes(case, world), key=lambda stock: (stock.zoo, "ddpm" not in stock.name), default=None)
    if stock is None:
        return
    pipes = [put_into(case, stock, world.pipe(stock)) for _ in range(2)]
    expected = [stock.draw(pipe, 4, seed=seed) for seed, pipe in enumerate(pipes)]
    found = in_threads([lambda pipe=pipe, seed=seed: stock.draw(pipe, 4, seed=seed) for seed, pipe in enumerate(pipes)])
    require(
        all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"two {stock.name} disturb each other"
    )


@SUITE.rule(own=True, when=is_known)
def travels(case: Case, world: World) -> None:
    """Saved in a pipeline and pushed, it loads in a fresh process, with this package and without it, to the same output."""
    world.journey.check(case)


def pack(case: Case, world: World, folder: Path) -> Parcel:
    """A tiny pipeline with the scheduler in it; the installed class must come back."""
    tiny = [stock for stock in homes(case, world) if not stock.zoo]
    stock = min(tiny, key=lambda stock: "ddpm" not in stock.name)
    pipe = put_into(case, stock, world.pipe(stock))
    classes = {"scheduler": f"{case.cls.__module__}.{case.cls.__name__}"}
    return pack_pipeline(pipe, folder, stock, classes=classes)


SUITE.pack = pack
