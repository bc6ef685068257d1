"""EcoDiff, by the five proofs."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

import diffusers_ext as dx
from diffusers_ext.metrics import count_macs
from diffusers_ext.models._groups import HEADS, NEURONS, cut, find_groups
from diffusers_ext.models.ecodiff import hard_concrete
from diffusers_ext.training._chain import backpropagate, pipeline_loop
from diffusers_ext.training._data import GlobalBatches, generator_for
from diffusers_ext.training.train_ecodiff import EcoDiffTask, ecodiff_loss, main, mask_penalty, parse_args
from tests.common import models
from tests.common.suite import CommonCase
from tests.tiny_models import class_conditional
from tests.unets import fill

exact = pytest.mark.proof("exact")
GOLDEN = Path(__file__).parents[1] / "golden" / "ecodiff.json"


def inputs(folder: Path) -> dict:
    if not (folder / "dit").is_dir():
        class_conditional(folder / "dit")
    return {
        "pretrained_model_name_or_path": folder / "dit", "num_inference_steps": 3, "guidance_scale": 2,
        "train_batch_size": 2, "num_targets": 4, "num_validation_images": 1, "learning_rate": 0.1, "beta": 0.01,
    }  # fmt: skip


COMMON = CommonCase(inputs=inputs)


def sd3() -> SD3Transformer2DModel:
    """With a second attention layer, and norms of queries and keys."""
    return fill(
        SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        )
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """With self- and cross-attention and gated feed-forward, and convolutional blocks, which stay."""
    return fill(
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


MODELS = {
    "unet": (unet, models.MODELS["UNet2DConditionModel"]),
    "dit": (models.dit, models.MODELS["DiTTransformer2DModel"]),
    "sd3": (sd3, models.MODELS["SD3Transformer2DModel"]),
    "flux": (models.flux, models.MODELS["FluxTransformer2DModel"]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def output(name: str, model: nn.Module) -> torch.Tensor:
    return MODELS[name][1].predict(model)


def masked(name: str, model: nn.Module, kept) -> torch.Tensor:
    """The output with masks of 0 and 1."""
    masks = dx.EcoDiffMasks.for_model(model)
    with masks.applied(model) as use:
        use({
            group.name: torch.tensor([float(unit in kept.get(group.name, range(group.units))) for unit in range(group.units)])
            for group in find_groups(model)
        })  # fmt: skip
        return output(name, model)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max().item() <= 1e-5 * max(other.abs().max().item(), 1.0)


# --- exact: masks ----------------------------------------------------------------------------------------------------


@exact
@every_model
def test_masks_of_one_are_the_original(name):
    model = MODELS[name][0]()
    plain = output(name, model)
    masks = dx.EcoDiffMasks.for_model(model)
    with masks.applied(model) as use:
        assert torch.equal(output(name, model), plain)
        use({layer: torch.ones(len(part)) for layer, part in masks.split(masks.scores).items()})
        assert torch.equal(output(name, model), plain)
        use({layer: torch.full((len(part),), 0.5) for layer, part in masks.split(masks.scores).items()})
        assert not torch.equal(output(name, model), plain)
    assert torch.equal(output(name, model), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


@exact
@every_model
def test_each_unit_has_a_mask_of_its_own(name):
    """To mask one head or neuron changes the output, and what is masked are its channels alone."""
    model = MODELS[name][0]()
    plain = output(name, model)
    for group in find_groups(model):
        for unit in {0, group.units - 1}:
            kept = [other for other in range(group.units) if other != unit]
            assert not torch.equal(masked(name, model, {group.name: kept}), plain), (group.name, unit)
    kinds = {group.kind for group in find_groups(model)}
    assert kinds == {HEADS, NEURONS}


@exact
def test_the_hard_concrete_law():
    """Where masks start, and a probability in closed form: the mask is 0 where the sigmoid is below 1/12."""
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)
    for eps, low, high in ((0.5, 0.985, 0.995), (0.1, 0.705, 0.715)):
        found = hard_concrete(torch.full_like(u, 3.0), u, eps)
        assert low < found.min() < high and found.max() == 1 and (found.diff() >= 0).all()
    scores = torch.full_like(u, 3.0)
    assert 0.2 < (hard_concrete(scores, u, 1e-9) < 1).double().mean() < 0.3
    for score in (-1.0, 0.5):
        share = (hard_concrete(torch.full_like(u, score), u, 1e-9) == 0).double().mean()
        wanted = torch.sigmoid(torch.tensor(0.83 * torch.log(torch.tensor(1 / 11.0)).item() - score))
        assert abs(share - wanted) < 1e-3


@exact
def test_the_loss():
    masks = dx.EcoDiffMasks(layers=["a", "b", "c"], kinds=[HEADS, NEURONS, HEADS], units=[2, 3, 1])
    with torch.no_grad():
        masks.scores.copy_(torch.tensor([1.0, -3.0, 2.0, 4.0, 0.0, -5.0]))
    assert mask_penalty(masks).item() == pytest.approx((2 + 5) / 2 + 2)
    squashed = torch.sigmoid(0.4 * masks.scores + 1)
    wanted = (squashed[:2].mean() + squashed[5]) / 2 + squashed[2:5].mean()
    assert mask_penalty(masks, "sigmoid").item() == pytest.approx(wanted.item())
    sample, target = torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 4.0]])
    assert ecodiff_loss(sample, target, masks, 0.1).item() == pytest.approx(9 / 6 + 0.55)


@exact
def test_the_lowest_scores_go_within_each_kind():
    masks = dx.EcoDiffMasks(layers=["a", "b", "c"], kinds=[HEADS, NEURONS, HEADS], units=[3, 4, 2])
    with torch.no_grad():
        masks.scores.copy_(torch.tensor([0.1, 0.2, 0.9, 5.0, 5.0, 5.0, 7.0, 0.3, 0.4]))
    assert masks.kept(0.4) == {
        "a": [2],
        "b": [0, 1, 3],
        "c": [0, 1],
    }  # 2 of 5 heads, 1 of 4 neurons, the last of equal ones
    assert masks.kept(0.5, "local") == {"a": [1, 2], "b": [0, 3], "c": [1]}
    assert masks.kept(0.0) == {"a": [0, 1, 2], "b": [0, 1, 2, 3], "c": [0, 1]}
    assert masks.kept(0.8) == {"a": [2], "b": [3], "c": []}


# --- exact: cutting --------------------------------------------------------------------------------------------------


@exact
@every_model
def test_the_pruned_model_is_the_masked_model(name):
    model = MODELS[name][0]()
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in find_groups(model):
        stays = torch.rand(group.units, generator=generator) < 0.6
        stays[0] = True
        kept[group.name] = stays.nonzero()[:, 0].tolist()
    small = dx.prune_model(model, kept)
    assert same(output(name, small), masked(name, model, kept))
    assert isinstance(small, type(model)) and small.config.remaining == {
        name: len(units) for name, units in kept.items()
    }
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert after < before
    call = MODELS[name][1].call(model)
    macs = [count_macs(functools.partial(each, **call)) for each in (model, small)]
    assert macs[1] < macs[0]


@exact
@every_model
def test_a_layer_that_loses_everything_gives_its_bias(name):
    """One layer at a time, then all of them."""
    model = MODELS[name][0]()
    groups = find_groups(model)
    for group in groups:
        small = dx.prune_model(model, {group.name: []})
        assert same(output(name, small), masked(name, model, {group.name: []})), group.name
    nothing = {group.name: [] for group in groups}
    assert same(output(name, dx.prune_model(model, nothing)), masked(name, model, nothing))
    if name != "flux":  # whose single blocks add up both kinds
        block = next(m for m in dx.prune_model(model, nothing).modules() if type(m).__name__ == "EmptyAttention")
        assert torch.equal(block(torch.randn(2, 3, 16), None)[1, 2], block.bias)


@exact
@every_model
def test_nothing_pruned_is_the_original_and_pruning_again_works(name):
    model = MODELS[name][0]()
    plain = output(name, model)
    masks = dx.EcoDiffMasks.for_model(model)
    assert torch.equal(output(name, masks.prune(model, 0.0)), plain)
    first, second = (next(g for g in find_groups(model) if g.kind == kind).name for kind in (HEADS, NEURONS))
    twice = dx.prune_model(dx.prune_model(model, {first: [1], second: [1, 2, 3, 4]}), {second: [0, 3]})
    once = dx.prune_model(model, {first: [1], second: [1, 4]})
    assert torch.equal(output(name, twice), output(name, once)) and twice.config.remaining == once.config.remaining
    assert torch.equal(output(name, model), plain) and type(model) is not type(once)
    with torch.no_grad():
        for parameter in once.parameters():
            parameter.zero_()
    assert torch.equal(output(name, model), plain), "weights are shared"


@exact
def test_parameters_are_really_gone():
    """Closed form for a DiT of width 8: a head of 4 channels has 3 (8 + 1) 4 + 4 * 8 weights, a neuron 8 + 1 + 8."""
    model = models.dit()
    count = sum(p.numel() for p in model.parameters())
    groups = {group.name: group for group in find_groups(model)}
    small = dx.prune_model(model, {"transformer_blocks.0.attn1": [1], "transformer_blocks.2.ff": list(range(2, 32))})
    assert groups["transformer_blocks.2.ff"].units == 32
    assert count - sum(p.numel() for p in small.parameters()) == 3 * 9 * 4 + 4 * 8 + 2 * 17


# --- exact: gradients and training -----------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("stock", ["tiny-dit", "tiny-flux", "avatars-sd"])
def test_the_checkpointed_gradient_is_that_of_the_full_graph(stock):
    """With the same u. To draw u anew when a step is taken again, as the authors' code does, is noticed."""
    made = models.STOCKS[stock]
    pipe = made.make()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.requires_grad_(False)
    masks = dx.EcoDiffMasks.for_model(denoiser)

    def gradient(checkpoint: bool, fresh: bool = False) -> torch.Tensor:
        again = set()

        def begin(step: int) -> None:
            seed = step + 100 * (fresh and step in again)
            again.add(step)
            use(masks(torch.rand(len(masks.scores), generator=torch.Generator().manual_seed(seed)), 0.1))

        call = {**made.call(3), "generator": torch.Generator().manual_seed(0)}
        with masks.applied(denoiser) as use:
            loop = pipeline_loop(pipe, call)
            found = backpropagate(
                loop, pipe.scheduler, lambda x: ecodiff_loss(x, torch.zeros_like(x), masks, 0.01), [masks.scores],
                begin=begin, checkpoint=checkpoint,
            )  # fmt: skip
        return found.gradients[0] - torch.autograd.grad(0.01 * mask_penalty(masks), masks.scores)[0]

    whole = gradient(False)
    scale = whole.abs().max()
    assert scale > 0 and (gradient(True) - whole).abs().max() < 1e-5 * scale
    with pytest.raises(RuntimeError, match="something else"):
        gradient(True, fresh=True)


def flags(folder: Path, output: str, **more) -> list[str]:
    values = {**inputs(folder), "output_dir": folder / output, "max_train_steps": 2, "seed": 3, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@exact
def test_the_trainer_is_the_papers_algorithm(tmp_path):
    """Two optimizer steps against a loop written out, with one graph of the whole run and AdamW."""
    args = flags(tmp_path, "ours", mask_eps=0.1)
    main(args)
    ours = dx.EcoDiffMasks.from_pretrained(tmp_path / "ours")

    pipe = DiTPipeline.from_pretrained(tmp_path / "dit")
    net, masks = pipe.transformer.requires_grad_(False), dx.EcoDiffMasks.for_model(pipe.transformer)
    groups = find_groups(net)
    optimizer = torch.optim.AdamW([masks.scores], lr=0.1, weight_decay=0.01)
    labels = [0, 3]  # the classes that the pipeline knows by name

    def run(rows, u):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(3)
        x = torch.stack([torch.randn(4, 8, 8, generator=generator_for(3, row)) for row in rows])
        classes = torch.tensor([labels[row % 2] for row in rows] + [1000] * len(rows))
        for step, t in enumerate(scheduler.timesteps):
            handles = []
            if u is not None:
                start = 0
                for group in groups:
                    part = slice(start, start + group.units)
                    lam, noise, start = masks.scores[part], u[step][part], start + group.units
                    s = torch.sigmoid((torch.log(noise + 0.1) - torch.log(1 - noise + 0.1) + lam) / 0.83)
                    m = (1.2 * s - 0.1).clamp(0, 1).repeat_interleave(group.width)
                    layer = net.get_submodule(group.readers[0][0])
                    handles.append(layer.register_forward_pre_hook(lambda _, args, m=m: (args[0] * m,)))
            eps = net(torch.cat([x, x]), timestep=t.expand(2 * len(rows)), class_labels=classes).sample[:, :4]
            for handle in handles:
                handle.remove()
            given, without = eps.chunk(2)
            x = scheduler.step(without + 2 * (given - without), t, x).prev_sample
        return x

    for step, batch in enumerate(GlobalBatches(4, 2, 3, 0, 2)):
        rows = [row for row, _ in batch]
        u = [torch.rand(len(masks.scores), generator=generator_for(0x4D61736B ^ 3, 3 * step + k)) for k in range(3)]
        with torch.no_grad():
            target = run(rows, None)
        scores = masks.split(masks.scores)
        heads, neurons = (
            torch.stack([scores[g.name].abs().mean() for g in groups if g.kind == kind]).mean()
            for kind in (HEADS, NEURONS)
        )
        loss = (run(rows, u) - target).square().mean() + 0.01 * (heads + neurons)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (ours.scores - masks.scores).abs().max() < 1e-4
    assert (ours.scores - 3).abs().max() > 0.1


@exact
def test_accumulated_batches_are_one_batch(tmp_path):
    """Masks are those of the optimizer step, whatever it is put together from."""
    for output, more in (("whole", {"train_batch_size": 4}), ("parts", {"gradient_accumulation_steps": 2})):
        main(flags(tmp_path, output, max_train_steps=4, mask_eps=0.1, **more))
    whole, parts = (dx.EcoDiffMasks.from_pretrained(tmp_path / name).scores for name in ("whole", "parts"))
    assert (whole - parts).abs().max() < 1e-4 and (whole - whole.mean()).abs().max() > 0.01


@exact
def test_bad_arguments_are_refused(tmp_path):
    model = models.dit()
    masks = dx.EcoDiffMasks.for_model(model)
    for call, message in (
        (lambda: masks.kept(1.0), r"`ratio` is 1.0; it must lie in \[0, 1\)"),
        (lambda: masks.kept(0.2, "layer"), "`scope` is 'layer'; allowed are 'global' and 'local'"),
        (lambda: masks.prune(unet(), 0.2), "has no layer 'transformer_blocks.0.attn1'"),
        (lambda: dx.EcoDiffMasks.for_model(model, ["norms"]), "`kinds` is .'norms'.; allowed are 'heads' and 'neurons'"),
        (lambda: dx.EcoDiffMasks.for_model(nn.Linear(2, 2)), "`model` is a Linear; allowed are DiTTransformer2DModel"),
        (lambda: dx.prune_model(model, {"transformer_blocks.9.ff": [0]}), "'transformer_blocks.9.ff', which is no layer"),
        (lambda: dx.prune_model(model, {"transformer_blocks.0.attn1": [2]}), "rising numbers from 0 to 1"),
        (lambda: dx.prune_model(model, {"transformer_blocks.0.attn1": [1, 0]}), "rising numbers from 0 to 1"),
        (lambda: dx.EcoDiffMasks(layers=["a"], kinds=["x"], units=[1]), "`kinds` is"),
        (lambda: dx.EcoDiffMasks(layers=["a"], units=[0]), "`units` is"),
        (lambda: masks.prune(StableDiffusionPipelineWithout(), 0.2), "a pipeline with a U-Net or a transformer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    hooked = dx.enable(models.dit(), dx.DeltaDiTConfig(boundary=2))
    with pytest.raises(ValueError, match="switch off methods and offloading first"):
        masks.prune(hooked, 0.2)
    class_conditional(tmp_path / "dit")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "dit"), "--output_dir", str(tmp_path / "out")]
    for flag, value in (("beta", "-1"), ("mask_eps", "0"), ("num_targets", "0"), ("validation_ratio", "1"), ("initial_score", "inf")):  # fmt: skip
        with pytest.raises(ValueError, match=f"`--{flag}` is"):
            parse_args([*base, f"--{flag}", value])
    with pytest.raises(ValueError, match="`--prompts` is"):
        EcoDiffTask(parse_args([*base, "--prompts", "x.txt"]))


class StableDiffusionPipelineWithout(DiTPipeline):
    def __init__(self) -> None:
        pass


@exact
def test_adapters_and_quantized_weights_are_not_cut():
    from peft import LoraConfig

    model = unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has a LoRA or quantized weights"):
        dx.prune_model(model, {})
    fused = models.flux()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections"):
        find_groups(fused)


# --- reference -------------------------------------------------------------------------------------------------------


def golden_modules() -> nn.Module:
    """An attention layer of 4 heads with biases, and feed-forward layers with and without a gate.

    Without the approximate GELU, which the authors turn into the exact one where they prune.
    """
    return fill(
        nn.ModuleDict({
            "attention": Attention(query_dim=8, heads=4, dim_head=2, bias=True),
            "gated": FeedForward(8, mult=1, activation_fn="geglu"),
            "plain": FeedForward(8, mult=1, activation_fn="gelu"),
        })
    )  # fmt: skip


GOLDEN_KEPT = {"attention": [0, 3], "gated": [1, 2, 6], "plain": [0, 4, 5, 7]}
GOLDEN_SCORES, GOLDEN_U = [3.0, 1.0, -0.5, 0.0, 2.0], [0.02, 0.3, 0.5, 0.77, 0.99]


def golden_states() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 8, dtype=torch.float32)).reshape(2, 3, 8)


@pytest.mark.proof("reference")
def test_masks_penalties_and_pruned_layers_are_those_of_the_authors_code():
    wanted = json.loads(GOLDEN.read_text())
    scores = torch.tensor(GOLDEN_SCORES, requires_grad=True)
    for eps in ("0.5", "0.1"):
        masks = hard_concrete(scores, torch.tensor(GOLDEN_U), float(eps))
        (slope,) = torch.autograd.grad(masks.sum(), scores)
        assert masks.tolist() == pytest.approx(wanted["masks"][eps], abs=1e-6)
        assert slope.tolist() == pytest.approx(wanted["slopes"][eps], abs=1e-6)
    both = dx.EcoDiffMasks(layers=["a", "b"], kinds=[HEADS, HEADS], units=[2, 3])
    with torch.no_grad():
        both.scores.copy_(scores)
    for kind in ("l1", "sigmoid"):
        assert mask_penalty(both, kind).item() == pytest.approx(wanted["penalties"][kind], rel=1e-5)
    layers = golden_modules()
    cut(layers, GOLDEN_KEPT)
    with torch.no_grad():
        for name, layer in layers.items():
            assert layer(golden_states()).flatten().tolist() == pytest.approx(wanted["outputs"][name], abs=1e-5), name


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
@every_model
def test_pruned_models_are_saved_and_loaded(name, tmp_path):
    from diffusers import AutoModel

    model = MODELS[name][0]()
    groups = find_groups(model)
    kept = {group.name: list(range(0, group.units, 2)) for group in groups} | {groups[0].name: [], groups[1].name: []}
    small = dx.prune_model(model, kept)
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    for loaded in (type(small).from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is type(small) and torch.allclose(output(name, loaded), output(name, small), atol=1e-6)
        assert loaded.state_dict().keys() == small.state_dict().keys()
    with pytest.raises((ValueError, RuntimeError, OSError)):
        type(model).from_pretrained(tmp_path)  # the stock class does not take what it cannot hold


@pytest.mark.proof("loads")
def test_pruned_models_train_and_take_loras_and_caches(tmp_path):
    from peft import LoraConfig

    model = unet()
    small = dx.EcoDiffMasks.for_model(model).prune(model, 0.3, "local")
    small.enable_gradient_checkpointing()
    small.train()
    small(**MODELS["unet"][1].call(small)).sample.square().mean().backward()
    assert all(p.grad is not None for p in small.parameters() if p.numel())
    plain = output("unet", small.eval())
    with dx.enabled(small, dx.DeepCacheConfig(interval=2)):
        assert len(MODELS["unet"][1].run(small, 3)) == 3
    assert torch.equal(output("unet", small), plain)
    small.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    assert torch.allclose(output("unet", small), plain, atol=1e-6)


@pytest.mark.proof("loads")
def test_a_pruned_pipeline_travels(tmp_path):
    """Stock loading in a fresh process, from a folder and from the Hub; without this package from the files beside it."""
    from tests.fresh import run_fresh
    from tests.hub_server import HubServer

    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    masks = dx.EcoDiffMasks.for_model(pipe.unet)
    with torch.no_grad():
        masks.scores.copy_(torch.rand(len(masks.scores), generator=torch.Generator().manual_seed(0)))
    masks.save_pretrained(tmp_path / "masks")
    again = dx.EcoDiffMasks.from_pretrained(tmp_path / "masks")
    assert torch.equal(again.scores, masks.scores) and again.config.layers == masks.config.layers
    before = pipe.unet
    assert again.prune(pipe, 0.3) is pipe and pipe.unet is not before
    stock = models.STOCKS["avatars-sd"]
    picture = stock.draw(pipe)
    pipe.save_pretrained(tmp_path / "stock")
    torch.save(picture, tmp_path / "picture.pt")
    code = f"""
        import pathlib, torch
        import diffusers_ext as dx
        from diffusers import DiffusionPipeline, UNet2DConditionModel
        from tests.common import models
        root = pathlib.Path({str(tmp_path)!r})
        picture = torch.load(root / "picture.pt")
        pipe = DiffusionPipeline.from_pretrained(root / "stock")
        assert isinstance(pipe.unet, UNet2DConditionModel)
        assert torch.allclose(models.draw(pipe, models.STOCKS["avatars-sd"].call(3)), picture, atol=1e-4)
        dx.push_to_hub(pipe, "me/pruned")
        for load in (dx.Pipeline, DiffusionPipeline):
            pulled = load.from_pretrained("me/pruned", **({{}} if load is dx.Pipeline else {{"trust_remote_code": True}}))
            assert torch.allclose(models.draw(pulled, models.STOCKS["avatars-sd"].call(3)), picture, atol=1e-4)
    """
    with HubServer() as hub:
        run_fresh(code, env=hub.env)


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(tmp_path)
    card = method_card("ecodiff")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), names)
    assert isinstance(names["pipe"].unet, dx.PrunedUNet2DConditionModel) and names["image"].size == (32, 32)
    assert "2412.02852" in card


@exact
@pytest.mark.parametrize("target", ["to_q", "proj_in"])
def test_a_lora_is_refused_wherever_it_is(target):
    from peft import LoraConfig

    model = unet()
    model.add_adapter(LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match="has a LoRA"):
        dx.prune_model(model, {})
