"""Fast Forward, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffusers_ext as dx
from diffusers_ext.registry import get_method
from diffusers_ext.training._loop import train
from diffusers_ext.training.fast_forward import FastForward
from diffusers_ext.training.train_fast_forward_lora import FastForwardTask, main, parse_args
from tests.common import trainer
from tests.common.suite import Case, CommonCase


def inputs(folder: Path) -> dict[str, Any]:
    """A run with a stage after each step, on a few pictures."""
    given = trainer.given(Case(get_method("fast_forward_lora"), None, (), CommonCase(), ""), None, folder)  # type: ignore[arg-type]  # the world is not used
    # At a small rate a stage has hundreds of additions.
    return given | {"rank": 2, "fast_forward_interval": 1, "fast_forward_pictures": 4, "learning_rate": 3e-2}


COMMON = CommonCase(inputs=inputs)
exact = pytest.mark.proof("exact")
GOLDEN = Path(__file__).parents[1] / "golden" / "fast_forward_lora.json"
INTERVAL, WARMUP = 6, 1  # without a first step of their own, the authors' code evaluates there, and stays in that mode
GOLDEN_RUNS: dict[str, dict[str, Any]] = {
    "far": {"start": [1.0, -2.0, 0.5], "target": [3.0, 1.0, 0.0], "lr": 0.05},
    "near": {"start": [1.0, -2.0, 0.5], "target": [1.5, -1.0, 0.6], "lr": 0.2},
}


class Quadratic(nn.Module):
    """Half the squared distance to a target, the axes weighed 1, 2, 3."""

    def __init__(self, start: list[float], target: list[float]) -> None:
        super().__init__()
        self.lora = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.target = torch.tensor(target, dtype=torch.float64)

    def loss(self) -> torch.Tensor:
        weights = torch.arange(1, len(self.target) + 1, dtype=torch.float64)
        return (weights * (self.lora - self.target).square()).sum() / 2


class Line(nn.Module):
    """One parameter; an optimizer that moves it by 1 a step."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), start))

    def step(self) -> None:
        with torch.no_grad():
            self.w += 1.0


def stage(tau: float) -> tuple[float, FastForward]:
    """Where one stage ends whose loss is quadratic along the update, with its minimum after `tau` more updates."""
    line = Line()
    forward = FastForward(line.parameters(), lambda: (line.w.item() - 1.0 - tau) ** 2, interval=1)
    forward.around_step(line.step)
    return line.w.item() - 1.0, forward


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(
    ("tau", "stop"),
    [(0.0, 0), (-2.0, 0), (0.4, 0), (0.5, 0), (0.6, 1), (3.0, 3), (3.4, 3), (3.5, 3), (3.7, 4), (12.0, 12)],
)
def test_a_stage_ends_at_the_integer_nearest_to_the_minimum(tau, stop):
    """A tie goes to the lower one; possibly beyond the minimum. It costs one validation more than additions, and the first."""
    ended, forward = stage(tau)
    assert ended == stop and forward.additions == [stop] and forward.validations == stop + 2


@exact
def test_after_a_stage_without_a_gain_the_parameters_are_those_of_the_step():
    """Bit for bit, where subtracting what was added would round."""
    generator = torch.Generator().manual_seed(0)
    one = nn.Parameter(torch.randn(1000, generator=generator))
    change = 1e-3 * torch.randn(1000, generator=generator)
    expected = (one.detach() + change).clone()
    values = iter([0.0, 1.0])
    forward = FastForward([one], lambda: next(values), interval=1)

    def step():
        with torch.no_grad():
            one.add_(change)

    forward.around_step(step)
    assert one.detach().equal(expected)
    update = one.detach() - (expected - change)
    assert not ((expected + update) - update).equal(expected), "subtracting would not undo it"


@exact
def test_a_stage_never_ends_with_a_higher_loss():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        target = torch.randn(3, generator=generator).tolist()
        model = Quadratic(torch.randn(3, generator=generator).tolist(), target)
        seen: list[float] = []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.3)

        def loss(model=model, seen=seen):
            seen.append(model.loss().item())
            return seen[-1]

        forward = FastForward(model.parameters(), loss, optimizer, interval=1)
        model.loss().backward()
        forward.step()
        assert model.loss().item() == min(seen) <= seen[0]


def adam(interval: float, steps: int = 20, **options) -> tuple[Quadratic, FastForward, list[torch.Tensor]]:
    model = Quadratic([1.0, -2.0, 0.5], [3.0, 1.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    forward = FastForward(model.parameters(), model.loss, optimizer, interval=interval, **options)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        forward.step()
        path.append(model.lora.detach().clone())
    return model, forward, path


@exact
def test_an_infinite_interval_is_the_optimizer_alone():
    model = Quadratic([1.0, -2.0, 0.5], [3.0, 1.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    _, forward, path = adam(math.inf)
    for place in path:
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        assert model.lora.detach().equal(place)
    assert forward.validations == 0 and not forward.additions


@exact
def test_stages_come_every_interval_after_the_warm_up():
    _, forward, path = adam(6, steps=20, warmup=2)
    assert len(forward.additions) == 3, "after steps 8, 14 and 20"
    _, _, plain = adam(math.inf, steps=20)
    assert all(path[i].equal(plain[i]) for i in range(7)) and not path[7].equal(plain[7])
    assert forward.validations == sum(forward.additions) + 2 * len(forward.additions)


@exact
def test_it_stops_after_stages_without_a_gain_in_a_row():
    line = Line()
    values = iter([0, 1, 0, 1, 5, 4, 6, 0, 1, 0, 1, 0, 1])  # no gain twice, a gain, no gain three times
    forward = FastForward([line.w], lambda: next(values), interval=1, patience=3)
    for _ in range(6):
        assert not forward.stopped
        forward.around_step(line.step)
    assert forward.stopped and forward.additions == [0, 0, 1, 0, 0, 0]
    forward.around_step(line.step)
    assert forward.validations == 13, "no more of them"


@exact
def test_its_state_goes_on_where_it_was():
    """Saved in the middle of an interval, with the optimizer's state."""
    _, _, straight = adam(4, steps=13)
    model = Quadratic([1.0, -2.0, 0.5], [3.0, 1.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    forward = FastForward(model.parameters(), model.loss, optimizer, interval=4)
    for step in range(13):
        if step == 6:
            state, moments = forward.state_dict(), optimizer.state_dict()
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            optimizer.load_state_dict(moments)
            forward = FastForward(model.parameters(), model.loss, optimizer, interval=4)
            forward.load_state_dict(state)
        optimizer.zero_grad()
        model.loss().backward()
        forward.step()
    assert model.lora.detach().equal(straight[-1])


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "`interval` is 0"),
        ({"interval": 1.5}, "`interval` is 1.5"),
        ({"interval": math.nan}, "`interval` is nan"),
        ({"warmup": -1}, "`warmup` is -1"),
        ({"patience": 0}, "`patience` is 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FastForward(Line().parameters(), lambda: 0.0, **options)
    with pytest.raises(ValueError, match="`parameters`"):
        FastForward([], lambda: 0.0)
    with pytest.raises(ValueError, match="`optimizer`"):
        FastForward(Line().parameters(), lambda: 0.0).step()


@exact
@pytest.mark.parametrize(
    "flag",
    [
        "--fast_forward_interval=0",
        "--fast_forward_pictures=0",
        "--fast_forward_warmup_steps=-1",
        "--fast_forward_patience=0",
    ],
)
def test_bad_arguments_of_the_trainer_are_refused(flag, tmp_path):
    name = flag.partition("=")[0]
    with pytest.raises(ValueError, match=f"`{name}`"):
        main(["--pretrained_model_name_or_path=x", "--train_data_dir=y", f"--output_dir={tmp_path / 'out'}", flag])
    assert not list(tmp_path.iterdir())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_a_stage_is_that_of_the_authors_code_but_for_its_last_addition(name):
    """They validate at the same places. Two faults of theirs are left out: the place before the first addition is not
    compared, and the last addition, by which the loss rose, is kept."""
    settings, wanted = GOLDEN_RUNS[name], json.loads(GOLDEN.read_text())["runs"][name]
    model = Quadratic(settings["start"], settings["target"])
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"])
    places: list[list[float]] = []

    def loss():
        places.append(model.lora.tolist())
        return model.loss()

    forward = FastForward(model.parameters(), loss, optimizer, interval=INTERVAL, warmup=WARMUP)
    for _ in range(WARMUP + INTERVAL):
        optimizer.zero_grad()
        model.loss().backward()
        forward.step()
    torch.testing.assert_close(torch.tensor(places[1:]), torch.tensor(wanted["validated"]), rtol=1e-6, atol=1e-9)
    assert wanted["after"] == pytest.approx(wanted["validated"][-1])
    assert model.lora.tolist() == pytest.approx(wanted["validated"][-2])


@pytest.mark.proof("loads")
def test_the_trainer_holds_pictures_out_and_their_loss_never_rises_in_a_stage(tmp_path):
    args = parse_args(trainer.flags({**inputs(tmp_path), "output_dir": tmp_path / "out", "max_train_steps": 2}))
    task = FastForwardTask(args)
    seen: list[list[float]] = []

    def watched(self, before):
        seen.append([])
        stage_of(self, before)
        seen[-1].append(self.validation_loss())

    def noted(self):
        seen[-1].append(validate(self))
        return seen[-1][-1]

    stage_of, validate = FastForward._stage, FastForward._validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastForward, "_stage", watched)
        patch.setattr(FastForward, "_validate", noted)
        train(args, task)
    (forward,) = task.callbacks
    assert isinstance(forward, FastForward)
    assert len(forward.additions) == 2 and forward.validations == sum(len(stage) - 1 for stage in seen)
    for stage, kept in zip(seen, forward.additions, strict=True):
        first, *_, ended = stage
        assert ended == min(stage) <= first and stage.index(ended) == kept, "the loss is the same at each call"
    everything = task.dataset(args)
    assert len(everything) == 8 and len(everything.dataset) == 12
    with pytest.raises(ValueError, match="`--fast_forward_pictures` is 12"):
        args.fast_forward_pictures = 12
        task.dataset(args)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card, snippet

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet("fast_forward_lora"), "card", "exec"), names)
    assert isinstance(names["fast_forward"], dx.FastForward) and names["fast_forward"].validations > 0
    assert "2409.04206" in method_card("fast_forward_lora")
