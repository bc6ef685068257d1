"""HarmoniCa, by the five proofs."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, HeunDiscreteScheduler, PixArtTransformer2DModel

import diffusers_ext as dx
from diffusers_ext.hooks._plan import Call, find_run, uninstall
from diffusers_ext.hooks.harmonica import _Plan, new_router, route, sublayer_names
from diffusers_ext.training._data import GlobalBatches, SampleNoise
from diffusers_ext.training.train_harmonica import MIX, PLAIN, STORE, main, router_loss, soft_cache
from tests.card_snippets import run_card
from tests.common import models
from tests.common.learned import check_other_weights_are_told, check_recipe_names_the_part
from tests.common.suite import CommonCase
from tests.tiny_models import class_conditional
from tests.transformers import TRANSFORMERS
from tests.unets import fill

GOLDEN = Path(__file__).parents[1] / "golden" / "harmonica.json"
SCRATCH = tempfile.TemporaryDirectory(prefix="harmonica-")  # gone with the process
ROOT = Path(SCRATCH.name)
exact = pytest.mark.proof("exact")
TWICE = ("CogView4Transformer2DModel", "EasyAnimateTransformer3DModel")  # one feed-forward for picture and prompt
SUPPORTED = ("DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")


def saved_router(table, model, folder: Path | None = None) -> str:
    """A router whose table this is, `(steps, sublayers)` of booleans or shares."""
    table = torch.as_tensor(np.asarray(table), dtype=torch.float32)
    router = new_router(model, len(table))
    with torch.no_grad():
        router.logits.copy_(torch.logit(table, eps=1e-3))
    folder = Path(tempfile.mkdtemp(dir=ROOT)) if folder is None else folder
    router.save_pretrained(folder)
    return str(folder)


def striped(model, steps: int = 3) -> np.ndarray:
    """Every second sublayer runs, at the next step the others."""
    return (np.arange(steps)[:, None] + np.arange(len(sublayer_names(model)))) % 2 == 0


def case(model) -> dx.HarmonicaConfig:
    if dx.HarmonicaConfig.supports(model) is not None:
        return dx.HarmonicaConfig("me/router")
    return dx.HarmonicaConfig(saved_router(striped(model), model))


COMMON = CommonCase(
    settings=[{"router": "me/router"}],
    make=case,
    free_text=("router",),
    skips={
        "travels": "a recipe names its router in a repository; the test of the Hub below has one",
        "runs_leave_nothing": "a router is for one number of steps, and the rule takes several; tested below",
    },
)


@contextmanager
def called(model, names):
    """Names of the modules that run, in order, of those that have layers inside to see it by."""
    ran: list[str] = []
    handles = []
    for name in names:
        inner = [child for child in model.get_submodule(name).children() for child in child.modules()]
        layer = next((child for child in inner if isinstance(child, torch.nn.Linear)), None)
        if layer is not None:
            handles.append(layer.register_forward_hook(lambda *_, name=name: ran.append(name)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


# --- exact: the table ------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_router_that_computes_everything_is_the_full_model(name):
    model = models.MODELS[name]
    one = model.make()
    plain = model.run(one, 4)
    with dx.enabled(one, dx.HarmonicaConfig(saved_router(np.ones((4, len(sublayer_names(one)))), one))):
        assert all(torch.equal(a, b) for a, b in zip(model.run(one, 4), plain, strict=True))


def recorded(model, one, names, steps: int) -> list[dict[str, list[torch.Tensor]]]:
    """What each sublayer gives at each step, where the method is on: what its block goes on with."""
    found: list[dict[str, list[torch.Tensor]]] = []
    forwards = {}
    for name in names:
        module = one.get_submodule(name)
        forwards[name] = module.forward

        def wrapped(*args, _name=name, _forward=module.forward, **kwargs):
            output = _forward(*args, **kwargs)
            found[-1][_name] = [part.clone() for part in ([output] if torch.is_tensor(output) else output)]
            return output

        module.forward = wrapped
    for step in range(steps):
        found.append({})
        model.predict(one, step)
    for name, forward in forwards.items():
        one.get_submodule(name).forward = forward
    return found


@exact
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_not_computed_is_what_was_computed_last(name):
    """The table says what runs at each step; every other sublayer gives its last output, bit for bit."""
    model = models.MODELS[name]
    one = model.make()
    names = sublayer_names(one)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand((5, len(names)), generator=generator) > 0.5
    table[0] = False  # the first step computes all the same
    table[3] = False
    with dx.enabled(one, dx.HarmonicaConfig(saved_router(table, one))):
        outputs = recorded(model, one, names, 5)
        runs = []
        for step in range(5):
            with called(one, names) as ran:
                model.predict(one, step)
            runs.append(ran)
    visible = [sublayer for sublayer in names if not sublayer.endswith("proj_mlp")]
    assert sorted(runs[0]) == sorted(visible), "the first step always runs everything"
    for step in range(1, 5):
        wanted = [sublayer for sublayer, computes in zip(names, table[step].tolist(), strict=True) if computes]
        assert sorted(runs[step]) == sorted(set(wanted) & set(visible))
        for i, sublayer in enumerate(names):
            same = all(
                torch.equal(a, b) for a, b in zip(outputs[step][sublayer], outputs[step - 1][sublayer], strict=True)
            )
            assert same == (not table[step][i]), (step, sublayer)


@exact
@pytest.mark.parametrize("name", TWICE)
def test_a_feed_forward_that_runs_twice_keeps_both_outputs(name):
    """Given the same input at every step, kept outputs are those that would be computed."""
    model = TRANSFORMERS[name]
    one = model.make()
    plain = model.predict(one)
    route(one, torch.as_tensor(striped(one, 4)))
    assert all(torch.equal(model.predict(one), plain) for _ in range(4))


@exact
@pytest.mark.parametrize("name", [*SUPPORTED, *TWICE])
def test_the_table_in_use_is_the_soft_form_with_shares_of_zero_and_one(name):
    model = TRANSFORMERS[name]
    one = model.make()
    table = torch.as_tensor(striped(one, 4))
    route(one, table)
    hard = model.run(one, 4)
    uninstall(one, "harmonica")
    soft = []
    with soft_cache(one, 0.1) as (cache, begin):
        begin()
        for step in range(4):
            cache.use(*((STORE,) if step == 0 else (MIX, table[step].float())))
            soft.append(model.predict(one, step))
    assert all(torch.equal(a, b) for a, b in zip(hard, soft, strict=True))
    assert not torch.equal(hard[2], model.run(one, 4)[2]), "and off again it is the full model"


@exact
def test_soft_shares_mix_and_store_what_was_mixed():
    """By hand, with sublayers that return numbers: o = r f + (1 - r) c, and c becomes o where r is over the threshold."""
    one = models.MODELS["DiTTransformer2DModel"].make()
    names = sublayer_names(one)
    numbers = iter(range(1, 100))
    seen: list[list[float]] = []
    for name in names:
        module = one.get_submodule(name)
        module.forward = lambda x, *args, **kwargs: torch.full_like(x, next(numbers))
    shares = torch.tensor([0.5, 0.05, 1.0, 0.0, 0.1, 0.11])
    with soft_cache(one, 0.1) as (cache, begin):
        begin()
        for mode in (STORE, MIX, PLAIN, MIX):
            cache.use(mode, shares) if mode == MIX else cache.use(mode)
            found: list[float] = []
            outer = [one.get_submodule(name).forward for name in names]
            for name, forward in zip(names, outer, strict=True):

                def look(*args, _forward=forward, _found=found, **kwargs):
                    output = _forward(*args, **kwargs)
                    _found.append(output.flatten()[0].item())
                    return output

                one.get_submodule(name).forward = look
            models.MODELS["DiTTransformer2DModel"].predict(one, 0)
            for name, forward in zip(names, outer, strict=True):
                one.get_submodule(name).forward = forward
            seen.append(found)
    kept = np.arange(1.0, 7.0)
    assert seen[0] == kept.tolist()
    expected = []
    for first in (7.0, 19.0):  # PLAIN in between takes the numbers 13 to 18 and leaves the cache alone
        r = shares.double().numpy()
        mixed = r * (first + np.arange(6)) + (1 - r) * kept
        expected.append(mixed)
        kept = np.where(shares.numpy() > np.float32(0.1), mixed, kept)
    assert seen[1] == pytest.approx(expected[0].tolist()) and seen[3] == pytest.approx(expected[1].tolist())
    assert seen[2] == [13.0 + i for i in range(6)]


@exact
def test_equal_rows_share_a_mode():
    plan = _Plan([[True, True], [False, True], [True, True], [False, True], [False, False], [False, False]])
    assert plan.modes == ["full", "as step 1", "full", "as step 1", "as step 4", "as step 4"]
    assert plan.rows == {"full": (True, True), "as step 1": (False, True), "as step 4": (False, False)}


@exact
def test_a_run_has_the_steps_of_the_router_or_the_last_of_them():
    plan = _Plan([[True], [False], [True], [False]])
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    sample = torch.zeros(1)

    def modes(steps: int, scheduler) -> list[str]:
        return [plan.mode(Call(step, steps, sample, scheduler, {})) for step in range(steps)]

    assert modes(4, scheduler) == ["full", "as step 1", "full", "as step 1"]
    assert modes(3, scheduler) == ["full", "full", "as step 1"], "image-to-image"
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="for 4 denoiser calls, and this run has 5"):
        modes(5, scheduler)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="for 4 denoiser calls, and this run has 3"):
        modes(3, scheduler)
    assert plan.mode(Call(3, None, sample, None, {})) == "as step 1"
    with pytest.raises(ValueError, match="this run has more"):
        plan.mode(Call(4, None, sample, None, {}))


@exact
@pytest.mark.parametrize("name", ["tiny-dit", "tiny-flux", "tiny-sd3"])
def test_runs_leave_nothing(name):
    stock = models.STOCKS[name]
    pipe = stock.make()
    plain = stock.draw(pipe, 4)
    config = dx.HarmonicaConfig(saved_router(striped(pipe.transformer, 4), pipe.transformer))
    dx.enable(pipe, config)
    cached = stock.draw(pipe, 4)
    assert not torch.equal(cached, plain)
    models.abort(stock, pipe, seed=9)
    assert torch.equal(stock.draw(pipe, 4), cached)
    with pytest.raises(ValueError, match="for 4 denoiser calls, and this run has 6"):
        stock.draw(pipe, 6)
    assert torch.equal(stock.draw(pipe, 4), cached)
    dx.disable(pipe)
    assert torch.equal(stock.draw(pipe, 4), plain)


@exact
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_hooks_that_another_library_takes_off_are_noticed(name):
    """Of a Flux they are on single layers too, as accelerate's are. Of a DiT none is, and so none goes."""
    model = models.MODELS[name]
    one = model.make()
    config = case(one)
    with dx.enabled(one, config):
        expected = model.run(one, 3)
    cpu_offload(one, torch.device("cpu"))
    dx.enable(one, config)
    remove_hook_from_module(one, recurse=True)
    if name == "FluxTransformer2DModel":
        with pytest.raises(RuntimeError, match="proj_mlp were taken off by another library"):
            find_run(one, "harmonica")
    else:
        assert find_run(one, "harmonica") is not None
        assert all(torch.equal(a, b) for a, b in zip(model.run(one, 3), expected, strict=True))


@exact
def test_sublayers_are_found_from_the_structure():
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=8, caption_channels=8,
    )  # fmt: skip
    assert sublayer_names(pixart) == [
        f"transformer_blocks.{i}.{part}" for i in (0, 1) for part in ("attn1", "attn2", "ff")
    ]
    names = sublayer_names(models.MODELS["FluxTransformer2DModel"].make())
    assert names[:3] == [f"transformer_blocks.0.{part}" for part in ("attn", "ff", "ff_context")]
    assert names[-2:] == ["single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.attn"]


@exact
def test_what_does_not_fit_is_refused():
    dit, flux = (models.MODELS[name].make() for name in ("DiTTransformer2DModel", "FluxTransformer2DModel"))
    router = saved_router(striped(dit), dit)
    for target, config, message in (
        (flux, dx.HarmonicaConfig(router), "trained for another transformer"),
        (dit, dx.HarmonicaConfig("nowhere"), "neither a folder nor"),
        (models.MODELS["UNet2DModel"].make(), dx.HarmonicaConfig(router), "no list of transformer blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.enable(target, config)
        assert not dx.status(target)
    folder = ROOT / "other"
    dit.save_pretrained(folder)
    with pytest.raises(ValueError, match="holds a DiTTransformer2DModel; a CacheRouter is needed"):
        dx.enable(dit, dx.HarmonicaConfig(str(folder)))
    for arguments, name in (
        ({"router": ""}, "router"),
        ({"router": "x", "threshold": 1.0}, "threshold"),
        ({"router": "x", "threshold": math.nan}, "threshold"),
    ):
        with pytest.raises(ValueError, match=name):
            dx.HarmonicaConfig(**arguments)
    for wrong, name in (
        ({"steps": 0}, "steps"),
        ({"sublayers": []}, "sublayers"),
        ({"num_marks": -1}, "num_marks"),
    ):
        with pytest.raises(ValueError, match=name):
            dx.CacheRouter(**wrong)
    with pytest.raises(ValueError, match="`transformer` is a UNet2DModel"):
        new_router(models.MODELS["UNet2DModel"].make(), 3)


# --- exact: training -------------------------------------------------------------------------------------------------

STEPS, BATCH, RUNS_, BETA, RATE, SCALE, SEED = 4, 2, 3, 1e-3, 0.3, 2.0, 5


def training(folder: Path, output: str, *flags: str) -> dx.CacheRouter:
    main([
        f"--pretrained_model_name_or_path={folder / 'dit'}", f"--num_inference_steps={STEPS}", f"--guidance_scale={SCALE}",
        f"--train_batch_size={BATCH}", f"--beta={BETA}", f"--learning_rate={RATE}", f"--lambda_every={2 * STEPS}",
        f"--seed={SEED}", f"--output_dir={folder / output}", "--checkpointing_steps=1", "--num_validation_images=2",
        *flags,
    ])  # fmt: skip
    return dx.CacheRouter.from_pretrained(folder / output)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two trainings on a tiny DiT: 3 runs, and 1 run resumed to 3."""
    root = tmp_path_factory.mktemp("router")
    torch.manual_seed(0)
    class_conditional(root / "dit")
    pipe = DiTPipeline.from_pretrained(root / "dit")
    fill(pipe.transformer)  # fresh weights end in zeros: nothing would matter
    pipe.register_to_config(id2label={0: "boot, ankle boot", 3: "bag"})
    pipe.save_pretrained(root / "dit")
    training(root, "straight", f"--max_train_steps={RUNS_}")
    training(root, "resumed", "--max_train_steps=1")
    training(root, "resumed", f"--max_train_steps={RUNS_}", "--resume_from_checkpoint=latest")
    return root


class _Slow:
    """The paper's training as it stands: one optimizer step at each denoising step, a parameter and an optimizer a row."""

    def __init__(self, pipe: DiTPipeline, start: torch.Tensor) -> None:
        self.pipe, self.names = pipe, sublayer_names(pipe.transformer)
        self.rows = [torch.nn.Parameter(row.clone()) for row in start]
        self.optimizers = [torch.optim.AdamW([row], lr=RATE, weight_decay=0.0) for row in self.rows]
        self.cache: dict[str, torch.Tensor] = {}
        self.shares: torch.Tensor | None = None
        self.leave_cache = False
        for i, name in enumerate(self.names):
            module = pipe.transformer.get_submodule(name)

            def forward(*args, _f=module.forward, _i=i, **kwargs):
                output = _f(*args, **kwargs)
                if self.shares is not None and _i in self.cache:
                    r = self.shares[_i]
                    output = r * output + (1 - r) * self.cache[_i]
                    if r > 0.1:
                        self.cache[_i] = output.detach()
                elif not self.leave_cache:
                    self.cache[_i] = output.detach()
                return output

            module.forward = forward

    def epsilon(self, x, t, labels, shares=None, leave_cache=False):
        self.shares, self.leave_cache = shares, leave_cache
        both = torch.cat([x, x])
        out = self.pipe.transformer(both, timestep=t.expand(len(both)), class_labels=labels, return_dict=False)[0][
            :, :4
        ]
        cond, uncond = out.chunk(2)
        return uncond + SCALE * (cond - uncond)

    def run(self, x, labels, decide, learn=None):
        """One run; `decide(i)` gives the shares at step i or None, `learn` is called at each step but the first."""
        self.cache = {}
        labels = torch.cat([labels, torch.full_like(labels, 1000)])
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                wanted = self.epsilon(x, t, labels, leave_cache=True) if learn and i else None
            shares = decide(i)
            given = self.epsilon(x, t, labels, shares)
            if learn and i:
                learn(i, wanted, given, shares)
            x = scheduler.step(given.detach(), t, x).prev_sample
        return x

    def train(self):
        classes, lambdas = [0, 3], [0.0] * STEPS
        batches = GlobalBatches(len(classes), BATCH, SEED, 0, RUNS_)
        for k, batch in enumerate(batches):
            labels = torch.tensor([classes[index] for index, _ in batch])

            def start(batch=batch):
                noise = SampleNoise(SEED, torch.tensor([number for _, number in batch]))
                return torch.cat([torch.randn((1, 4, 8, 8), generator=g) for g in noise.generators])

            if k % 2 == 0:  # every 2 STEPS denoising steps
                shown = torch.tensor([classes[number % 2] for _, number in batch])
                with torch.no_grad():
                    full = self.run(start(), shown, lambda i: None)
                    for t in range(1, STEPS):
                        used = self.run(start(), shown, lambda i, t=t: self.rows[t].sigmoid() if i == t else None)
                        lambdas[t] = (used - full).square().mean().item()

            def learn(i, wanted, given, shares):
                loss = lambdas[i] * (wanted - given).square().mean() + BETA * shares.sum()
                self.optimizers[i].zero_grad()
                loss.backward()
                self.optimizers[i].step()
                with torch.no_grad():
                    self.rows[i].clamp_(-5, 5)

            self.run(start(), labels, lambda i: self.rows[i].sigmoid() if i else None, learn)
        return torch.stack([row.detach() for row in self.rows]), lambdas


@exact
def test_the_trainer_is_the_papers_algorithm(trained):
    """The trainer makes one optimizer step a run; the paper one a denoising step. They are the same."""
    straight = dx.CacheRouter.from_pretrained(trained / "straight")
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    pipe.transformer.requires_grad_(False)
    set_seed(SEED)
    first = new_router(pipe.transformer, STEPS).logits.detach()
    rows, lambdas = _Slow(pipe, first).train()
    assert (rows - first)[1:].abs().min() > 0.1 and lambdas[1] > 1e-4
    torch.testing.assert_close(straight.logits.detach(), rows, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(straight.lambdas, torch.tensor(lambdas), rtol=1e-3, atol=1e-6)
    assert (straight.logits[0] == 5).all(), "the first step is fixed"


@exact
def test_the_loss_and_its_gradient():
    wanted, given = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 4.0]], requires_grad=True)
    shares = torch.tensor([0.5, 0.25], requires_grad=True)
    loss = router_loss(wanted, given, shares, 0.1, 0.01)
    assert loss.item() == pytest.approx(0.1 * (0.25 + 4) / 2 + 0.01 * 0.75)
    loss.backward()
    assert given.grad.tolist() == [pytest.approx([0.05, 0.2])] and shares.grad.tolist() == pytest.approx([0.01, 0.01])


@exact
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--beta=-1", "beta"),
        ("--lambda_every=0", "lambda_every"),
        ("--threshold=1", "threshold"),
        ("--num_inference_steps=1", "num_inference_steps"),
        ("--mixed_precision=fp16", "mixed_precision"),
        ("--gradient_checkpointing", "gradient_checkpointing"),
        ("--train_batch_size=0", "train_batch_size"),
        ("--push_to_hub", "hub_model_id"),
    ],
)
def test_bad_arguments_of_the_trainer_are_refused(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--pretrained_model_name_or_path=x", f"--output_dir={tmp_path / 'out'}", flag])
    assert not list(tmp_path.iterdir())


@exact
def test_pipelines_without_a_transformer_or_without_prompts_are_refused(tmp_path):
    for model, message in (("avatars-sd", "pipeline with a transformer"), ("avatars-flow", "`--prompts` is None")):
        with pytest.raises(ValueError, match=message):
            main([f"--pretrained_model_name_or_path={dx.zoo_path(model)}", f"--output_dir={tmp_path / 'out'}"])
    arguments = [f"--pretrained_model_name_or_path={dx.zoo_path('avatars-flow')}", "--prompts=nowhere"]
    with pytest.raises(ValueError, match="one prompt a line"):
        main([*arguments, f"--output_dir={tmp_path / 'out'}"])


# --- reference -------------------------------------------------------------------------------------------------------

TIMES, GOLDEN_LAMBDA, GOLDEN_BETA = [50, 250, 450, 650], 0.7, 0.01


def golden_dit() -> DiTTransformer2DModel:
    """All blocks with the embedding of the first, as the authors' model has one for all."""
    model = fill(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
        )
    )  # fmt: skip
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def golden_inputs(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, timesteps and labels of one call; the state depends on the step only."""
    x = torch.sin(torch.arange(2 * 4 * 8 * 8) * 0.37 + step).reshape(2, 4, 8, 8)
    return x, torch.full((2,), TIMES[::-1][step]), torch.tensor([3, 10])


def golden_logits() -> torch.Tensor:
    """Shares over and under the threshold."""
    return 4 * torch.cos(torch.arange(4 * 4) * 1.3).reshape(4, 4)


def golden_numbers(x: torch.Tensor) -> list[float]:
    x = x.detach().double()
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


@pytest.mark.proof("reference")
def test_mixing_caching_loss_and_gradient_are_those_of_the_authors_code():
    wanted_rows = json.loads(GOLDEN.read_text())["steps"]
    model, logits = golden_dit().requires_grad_(False), golden_logits().requires_grad_()
    with soft_cache(model, 0.1) as (cache, begin):
        begin()

        def call(step: int) -> torch.Tensor:
            x, t, labels = golden_inputs(step)
            return model(x, timestep=t, class_labels=labels, return_dict=False)[0]

        cache.use(STORE)
        found = [{"full": golden_numbers(call(0))}]
        for step in range(1, 4):
            cache.use(PLAIN)
            full = call(step)
            shares = logits[step].sigmoid()
            cache.use(MIX, shares)
            mixed = call(step)
            loss = router_loss(full, mixed, shares, GOLDEN_LAMBDA, GOLDEN_BETA)
            gradient = torch.autograd.grad(loss, logits)[0]
            assert not gradient[[i for i in range(4) if i != step]].any(), "a step has its own row"
            found.append({
                "full": golden_numbers(full), "mixed": golden_numbers(mixed), "loss": [loss.item()],
                "gradient": gradient[step].tolist(),
            })  # fmt: skip
    for one, other in zip(found, wanted_rows, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal(trained):
    straight, resumed = (dx.CacheRouter.from_pretrained(trained / name) for name in ("straight", "resumed"))
    assert torch.equal(straight.logits, resumed.logits) and torch.equal(straight.lambdas, resumed.lambdas)
    assert straight.config.sublayers == resumed.config.sublayers and straight.config.steps == STEPS
    assert list((trained / "straight" / "samples").glob("step-*.png"))
    assert not list((trained / "straight").glob("*.bin"))
    card = (trained / "straight" / "README.md").read_text()
    assert "CacheRouter" in card and str(trained) not in card


@pytest.mark.proof("loads")
def test_a_router_of_other_weights_is_told(trained):
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    config = dx.HarmonicaConfig(str(trained / "straight"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.enable(copy.deepcopy(pipe).to(torch.bfloat16), config)
    check_other_weights_are_told(pipe, pipe.transformer, config)


@pytest.mark.proof("loads")
def test_other_schedulers_of_the_pipeline_have_their_own_number_of_calls(trained):
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    router = saved_router(striped(pipe.transformer, 5), pipe.transformer)
    dx.enable(pipe, dx.HarmonicaConfig(router))
    pipe([0], num_inference_steps=3)  # 5 calls
    with pytest.raises(ValueError, match="for 5 denoiser calls"):
        pipe([0], num_inference_steps=5)


@pytest.mark.proof("loads")
def test_a_pipeline_is_shared_with_the_name_of_its_router_and_not_with_a_local_folder(trained, tmp_path):
    check_recipe_names_the_part(
        tmp_path, trained / "dit", "[3], num_inference_steps=4", "CacheRouter", trained / "straight",
        "dx.HarmonicaConfig({})", change="part.logits[1:] = -5.0", exact=False,
    )  # fmt: skip


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, names = run_card("harmonica")
    assert not dx.status(names["pipe"]) and names["image"].size == (28, 28)
    assert "2410.01723" in card
