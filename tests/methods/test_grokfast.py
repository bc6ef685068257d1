"""Grokfast, by the five proofs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.registry import get_method
from diffusers_ext.training import train_text_to_image_lora
from diffusers_ext.training.grokfast import GrokfastEMA, GrokfastMA
from diffusers_ext.training.train_grokfast import main
from tests.common import trainer
from tests.common.suite import Case, CommonCase

exact = pytest.mark.proof("exact")
GOLDEN = Path(__file__).parents[1] / "golden" / "grokfast.json"
STEPS = 6
GOLDEN_RUNS = {
    "ema": ("ema", {"alpha": 0.98, "lamb": 2.0}),
    "slow ema": ("ema", {"alpha": 0.6, "lamb": 0.5}),
    "ma": ("ma", {"window": 3, "lamb": 5.0}),
    "window of one": ("ma", {"window": 1, "lamb": 1.5}),
}
KINDS = {"ema": GrokfastEMA, "ma": GrokfastMA}


def golden_gradient(step: int) -> torch.Tensor:
    return torch.cos(torch.arange(3.0) * 1.7 + 0.9 * step)[None]


def parameter(size: int = 3) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1, size))


def filtered(grad_filter, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a filter of one parameter makes of gradients."""
    (one,) = grad_filter.parameters
    found = []
    for gradient in given:
        one.grad = gradient.clone()
        grad_filter.apply()
        found.append(one.grad.clone())
    return found


def random_gradients(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, generator=generator) for _ in range(count)]


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_without_weight_gradients_are_bit_identical(kind):
    options = {"lamb": 0.0} | ({"window": 2} if kind == "ma" else {})
    given = random_gradients()
    assert all(a.equal(b) for a, b in zip(filtered(KINDS[kind]([parameter()], **options), given), given, strict=True))


@exact
def test_a_constant_gradient_grows_by_the_weight():
    constant = [torch.tensor([[1.0, -2.0, 0.5]])] * 7
    for gradient in filtered(GrokfastEMA([parameter()], 0.9, 2.0), constant):
        torch.testing.assert_close(gradient, 3 * constant[0])
    found = filtered(GrokfastMA([parameter()], 4, 2.0), constant)
    assert all(gradient.equal(constant[0]) for gradient in found[:3]), "before the window is full"
    assert all(gradient.equal(3 * constant[0]) for gradient in found[3:])


@exact
def test_a_filter_sees_raw_gradients():
    """In closed form: the moving average is of what backward gave, not of what the filter made of it."""
    given, alpha, lamb = random_gradients(), 0.7, 1.5
    found = filtered(GrokfastEMA([parameter()], alpha, lamb), given)
    for n, gradient in enumerate(found):
        slow = alpha**n * given[0] + (1 - alpha) * sum(
            alpha ** (n - i) * given[i] for i in range(1, n + 1)
        )  # h starts as the first gradient, so that h_1 is it
        torch.testing.assert_close(gradient, given[n] + lamb * slow)
    found = filtered(GrokfastMA([parameter()], 3, lamb), given)
    for n in range(2, len(given)):
        torch.testing.assert_close(found[n], given[n] + lamb * torch.stack(given[n - 2 : n + 1]).mean(0))


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_its_state_goes_on_with_the_same_bits(kind):
    options = {"window": 3} if kind == "ma" else {}
    given = random_gradients()
    straight = filtered(KINDS[kind]([parameter()], **options), given)
    first, second = (KINDS[kind]([parameter()], **options) for _ in range(2))
    begun = filtered(first, given[:4])
    second.load_state_dict(first.state_dict())
    assert all(a.equal(b) for a, b in zip([*begun, *filtered(second, given[4:])], straight, strict=True))
    with pytest.raises(ValueError, match="of 1 parameters; this filter has 2"):
        KINDS[kind]([parameter(), parameter()]).load_state_dict(first.state_dict())


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_a_gradient_wait(kind):
    one, two, frozen = parameter(), parameter(), torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    grad_filter = KINDS[kind]([one, frozen, two], **({"window": 1} if kind == "ma" else {}))
    one.grad = torch.ones(1, 3)
    grad_filter.apply()
    assert two.grad is None and frozen.grad is None and one.grad[0, 0] > 1
    two.grad = torch.ones(1, 3)
    grad_filter.apply()
    assert two.grad.equal(torch.full((1, 3), 3.0 if kind == "ema" else 6.0)), "its first gradient counts as its first"


@exact
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GrokfastEMA(p, alpha=1.0), "`alpha` is 1.0"),
        (lambda p: GrokfastEMA(p, lamb=-1), "`lamb` is -1"),
        (lambda p: GrokfastMA(p, window=0), "`window` is 0"),
        (lambda p: GrokfastMA(p, lamb=float("nan")), "`lamb` is nan"),
        (lambda p: GrokfastEMA([]), "`parameters`"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([parameter()])


@exact
@pytest.mark.parametrize("flag", ["--grad_filter_alpha=1", "--grad_filter_window=0", "--grad_filter_lamb=-1"])
def test_bad_arguments_of_the_trainer_are_refused(flag, tmp_path):
    name = flag.partition("=")[0]
    with pytest.raises(ValueError, match=f"`{name}`"):
        main(["--pretrained_model_name_or_path=x", "--train_data_dir=y", f"--output_dir={tmp_path / 'out'}", flag])
    assert not list(tmp_path.iterdir())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_gradients_are_those_of_the_authors_filters(name):
    kind, settings = GOLDEN_RUNS[name]
    found = filtered(KINDS[kind]([parameter()], **settings), [golden_gradient(step) for step in range(STEPS)])
    wanted = torch.tensor(json.loads(GOLDEN.read_text())["runs"][name])
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-5, atol=1e-6)


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_loop_filters_before_it_clips(tmp_path):
    """One step by hand on a task of one weight: filtered, then clipped, then stepped; and a filter outlives a checkpoint."""
    from argparse import ArgumentParser, Namespace

    from diffusers_ext.training._loop import Task, add_run_arguments, train

    class Weight(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def save_pretrained(self, folder):
            from safetensors.torch import save_file

            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file({"weight": self.weight.detach()}, Path(folder) / "weight.safetensors")

    class Line(Task):
        """The gradient is 0.01 times the number of the sample's step."""

        on_device = ()

        def __init__(self, lamb: float):
            self.trained = {"weight": Weight()}
            self.seen: list[float] = []
            self.callbacks = (GrokfastEMA(self.trained["weight"].parameters(), 0.5, lamb),)

        def dataset(self, args: Namespace):
            return Rows()

        def loss(self, batch, noise):
            slope = 0.01 * (batch["sample_id"].float().mean() + 1)
            self.trained["weight"].weight.register_hook(lambda gradient: self.seen.append(gradient.item()))
            return slope * self.trained["weight"].weight

        def save(self, folder):
            self.trained["weight"].save_pretrained(folder / "weight")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, item):
            return {"index": item[0], "sample_id": item[1]}

    def run(steps: int, output: Path, lamb: float = 2.0, **options) -> float:
        flags = {"output_dir": output, "max_train_steps": steps, "train_batch_size": 1, "learning_rate": 0.1,
                 "adam_weight_decay": 0, "adam_epsilon": 1.0, "checkpointing_steps": 2, **options}  # fmt: skip
        args = add_run_arguments(ArgumentParser()).parse_args([f"--{name}={value}" for name, value in flags.items()])
        args.train_data_dir, args.dataset_name = "x", None
        task = Line(lamb)
        train(args, task)
        return task.trained["weight"].weight.item()

    def by_hand(steps: int, lamb: float, limit: float) -> float:
        weight = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0, eps=1.0)
        slow = None
        for step in range(steps):
            gradient = 0.01 * (step + 1)
            slow = gradient if slow is None else 0.5 * slow + 0.5 * gradient
            weight.grad = torch.tensor(gradient + lamb * slow).clamp(max=limit)
            optimizer.step()
        return weight.item()

    for limit in (1.0, 0.05):
        assert run(4, tmp_path / str(limit), max_grad_norm=limit) == pytest.approx(by_hand(4, 2.0, limit), rel=1e-4)
    assert run(4, tmp_path / "none", lamb=0.0) == pytest.approx(by_hand(4, 0.0, 1.0), rel=1e-4)
    run(2, tmp_path / "resumed")
    resumed = run(4, tmp_path / "resumed", resume_from_checkpoint="latest")
    assert resumed == run(4, tmp_path / "straight")


@pytest.mark.proof("loads")
def test_without_weight_the_trainer_is_the_plain_one_and_with_it_another(tmp_path):
    """Bit for bit, and stock diffusers loads what they write."""
    given = trainer.given(Case(get_method("grokfast"), None, (), CommonCase(), ""), None, tmp_path)  # type: ignore[arg-type]  # the world is not used
    given |= {"rank": 2, "max_train_steps": 2, "learning_rate": 1e-3, "seed": 3}
    written = {}
    for name, run, options in (
        ("plain", train_text_to_image_lora.main, {}),
        ("zero", main, {"grad_filter_lamb": 0}),
        ("ma", main, {"grad_filter": "ma", "grad_filter_window": 2}),
    ):
        run(trainer.flags({**given, "output_dir": tmp_path / name, **options}))
        written[name] = (tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes()
        card = (tmp_path / name / "README.md").read_text()
        assert str(tmp_path) not in card and 'pipe.load_lora_weights("path/to/this/folder")' in card
    assert written["plain"] == written["zero"] != written["ma"]
    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"))
    pipe.load_lora_weights(tmp_path / "plain")
    assert pipe.get_active_adapters() == ["default_0"]


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card, snippet

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet("grokfast"), "card", "exec"), names)
    assert isinstance(names["grad_filter"], dx.GrokfastEMA)
    assert "2405.20233" in method_card("grokfast")
