"""DeepCache, by the five proofs."""

from __future__ import annotations

import copy
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffusers_ext as dx
from diffusers_ext.hooks.deepcache import quad_steps
from tests.common.suite import CommonCase
from tests.unets import UNETS, conditional, predict, spatio_temporal

COMMON = CommonCase(settings=[{"schedule": "quad", "center": 1, "interval": 2}, {"interval": 2, "branch": 2}])
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deepcache.json").read_text())

exact = pytest.mark.proof("exact")


def num_branches(unet) -> int:
    return sum(len(block.resnets) + 1 for block in unet.down_blocks)


def layers_of(unet):
    """`(layer name, skip that it makes or reads)` in the numbering of the paper: down layers make, up layers read."""
    down, up, offset, n = [], [], 0, len(unet.down_blocks)
    for i, block in enumerate(unet.down_blocks):
        r = len(block.resnets)
        down += [(f"down_blocks.{i}.resnets.{j}", offset + j + 1) for j in range(r)]
        down += [(f"down_blocks.{i}.downsamplers.{j}", offset + r + 1) for j in range(len(block.downsamplers or []))]
        k = n - 1 - i
        up += [(f"up_blocks.{k}.resnets.{j}", offset + r - j) for j in range(r + 1)]
        up += [(f"up_blocks.{k}.upsamplers.{j}", offset) for j in range(len(unet.up_blocks[k].upsamplers or []))]
        offset += r + 1
    return down, up


def calls(unet, step) -> set[str]:
    """Names of the modules that one denoiser call really computes."""
    seen, handles = set(), []
    leaves = [
        (name, module) for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))
    ]
    for name, module in leaves:
        handles.append(module.register_forward_hook(lambda *_, name=name: seen.add(name)))
    predict(unet, step)
    for handle in handles:
        handle.remove()
    return seen


@exact
@pytest.mark.parametrize("name", UNETS)
def test_interval_1_is_bit_equal(name):
    unet = UNETS[name]()
    plain = [predict(unet, step) for step in range(3)]
    dx.apply_deepcache(unet, dx.DeepCacheConfig(interval=1))
    assert all(torch.equal(predict(unet, step), plain[step]) for step in range(3))


@exact
@pytest.mark.parametrize("layers", [1, 2, 3, (1, 3, 2)])
def test_a_cached_step_runs_just_the_layers_of_the_rule(layers):
    for branch in range(num_branches(conditional(layers))):
        unet = conditional(layers)
        down, up = layers_of(unet)
        everything = calls(unet, 0)
        dx.enable(unet, dx.DeepCacheConfig(interval=2, branch=branch))
        assert calls(unet, 0) == everything, "a full step runs everything"
        computed = calls(unet, 1)
        for layer, skip in down + up:
            ran = any(name.startswith(f"{layer}.") for name in computed)
            assert ran == (skip <= branch), f"branch {branch}: {layer} belongs to skip {skip}"
            attention = layer.replace("resnets", "attentions")
            if attention != layer and any(name.startswith(f"{attention}.") for name in everything):
                assert any(name.startswith(f"{attention}.") for name in computed) == (skip <= branch), attention
        assert not any(name.startswith("mid_block") for name in computed)
        assert {"conv_in", "time_embedding.linear_1", "conv_out"} <= computed
        assert calls(unet, 2) == everything


def entry_module(unet, branch: int) -> nn.Module:
    """The up-path module whose output a cached step takes from the last full step, found by counting from the end."""
    up = [(k, j) for k, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    position = len(up) - (branch + 1) - 1  # the layer just before the last branch + 1
    if position < 0:
        return unet.mid_block
    k, j = up[position]
    block = unet.up_blocks[k]
    if j == len(block.resnets) - 1:
        return block
    for parts in ("motion_modules", "attentions"):
        if getattr(block, parts, None):
            return getattr(block, parts)[j]
    return block.resnets[j]


def substituted(unet, branch: int, full: int, cached: int) -> torch.Tensor:
    """Slow derivation: compute everything at step `cached`, but put the entry feature of step `full` in its place."""
    module, stored = entry_module(unet, branch), []
    handle = module.register_forward_hook(lambda _m, _a, output: stored.append(output))
    predict(unet, full)
    handle.remove()
    handle = module.register_forward_hook(lambda *_: stored[0])
    result = predict(unet, cached)
    handle.remove()
    return result


@exact
@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_cached_step_equals_the_slow_derivation_for_every_branch(name, layers):
    plain = UNETS[name](layers)
    for branch in range(num_branches(plain)):
        expected = substituted(plain, branch, full=0, cached=1)
        unet = UNETS[name](layers)
        dx.enable(unet, dx.DeepCacheConfig(interval=2, branch=branch))
        predict(unet, 0)
        assert torch.equal(predict(unet, 1), expected), f"branch {branch}"
        assert not torch.equal(expected, predict(plain, 1)), (
            "the test would not notice a cache that computes everything"
        )


@exact
def test_freeu_does_not_scale_the_stored_feature_again():
    """FreeU writes into its input; the slow derivation stores a copy, since it would be written to as well."""
    for branch in range(num_branches(conditional())):
        plain, unet = conditional(), conditional()
        for model in (plain, unet):
            model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        module, stored = entry_module(plain, branch), []
        handle = module.register_forward_hook(lambda _m, _a, output, s=stored: s.append(_clone(output)))
        predict(plain, 0)
        handle.remove()
        handle = module.register_forward_hook(lambda *_, s=stored: _clone(s[0]))
        expected = [predict(plain, step) for step in (1, 2)]
        handle.remove()
        dx.enable(unet, dx.DeepCacheConfig(interval=3, branch=branch))
        predict(unet, 0)
        assert [torch.equal(predict(unet, step), e) for step, e in zip((1, 2), expected, strict=True)] == [True, True]


def _clone(output):
    return output.clone() if torch.is_tensor(output) else tuple(part.clone() for part in output)


@exact
@pytest.mark.parametrize("name", UNETS)
def test_off_is_bit_equal_and_leaves_nothing_behind(name):
    unet = UNETS[name]()
    attributes = {path: set(module.__dict__) for path, module in unet.named_modules()}
    before = predict(unet, 0)
    dx.enable(unet, dx.DeepCacheConfig(interval=2))
    predict(unet, 0), predict(unet, 1)
    dx.disable(unet)
    assert torch.equal(predict(unet, 0), before)
    assert {path: set(module.__dict__) for path, module in unet.named_modules()} == attributes
    assert dx.status(unet) == []


@exact
def test_quad_schedule():
    assert quad_steps(50, 5, 15, 1.4) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    with pytest.raises(ValueError, match="`center` is 50"):
        quad_steps(50, 5, 50, 1.4)


@exact
@settings(max_examples=200, deadline=None)
@given(num_steps=st.integers(2, 100), interval=st.integers(2, 12), data=st.data())
def test_quad_schedule_properties(num_steps, interval, data):
    center = data.draw(st.integers(0, num_steps - 1))
    try:
        steps = quad_steps(num_steps, interval, center, 1.4)
    except ValueError:
        return  # it says so where no exponent gives that many distinct steps
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] < num_steps
    assert len(steps) == -(-num_steps // interval)


@exact
def test_two_runs_another_batch_size_and_a_new_run_do_not_leak():
    fresh = conditional()
    dx.enable(fresh, dx.DeepCacheConfig(interval=3))
    expected = [predict(fresh, step, batch=3, seed=1) for step in range(5)]
    unet = conditional()
    dx.enable(unet, dx.DeepCacheConfig(interval=3))
    for step in range(5):
        predict(unet, step)
    predict(unet, 2, batch=3, seed=1)  # another batch size: a new run, broken off after one step
    for _ in range(2):  # the timestep goes up: a new run
        assert all(torch.equal(predict(unet, step, batch=3, seed=1), expected[step]) for step in range(5))


def picture(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a person with tan skin", num_inference_steps=6, generator=generator, output_type="np", **options
    ).images


@exact
def test_an_abort_leaves_no_trace_in_image_to_image(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=3))
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image_to_image.set_progress_bar_config(disable=True)
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))

    def late_start():
        return picture(image_to_image, image=image, strength=0.4)

    expected = late_start()

    def abort(_pipe, step, _t, _kwargs):
        if step == 1:  # a full step has been stored, at a high timestep
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pipe("a person with pale skin", num_inference_steps=6, callback_on_step_end=abort)
    assert (late_start() == expected).all()
    with pytest.raises(KeyboardInterrupt):
        pipe("a person with pale skin", num_inference_steps=6, callback_on_step_end=abort)
    fresh = picture(pipe)
    assert (picture(pipe) == fresh).all()


@exact
def test_nothing_is_kept_between_runs(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    picture(pipe)
    run = pipe.unet.conv_in._diffusers_hook.hooks["diffusers_ext.deepcache.clock"].run
    assert run.state.slots == [] and run.manager._state_cache == {}


@exact
def test_two_pipelines_in_two_threads(pipe):
    other = copy.deepcopy(pipe)
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    dx.enable(other, dx.DeepCacheConfig(interval=3, branch=2))
    expected = [picture(pipe), picture(other)]
    results: dict[int, list] = {0: [], 1: []}

    def work(i):
        results[i] += [picture((pipe, other)[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(results[i]) == 3 and all((result == expected[i]).all() for result in results[i])


@exact
def test_a_deep_copy_has_its_own_weights_and_state(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    expected = picture(pipe)
    clone = copy.deepcopy(pipe)
    assert (picture(clone) == expected).all()
    with torch.no_grad():
        for parameter in clone.unet.parameters():
            parameter.zero_()
    assert not (picture(clone) == expected).all()
    assert (picture(pipe) == expected).all()
    dx.disable(clone)
    assert [entry.key for entry in dx.status(pipe)] == ["deepcache"] and (picture(pipe) == expected).all()


@exact
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["module", "leaves", "groups"])
def test_offloading_in_both_orders(when, kind):
    """accelerate's hooks on the whole model and on each leaf (`enable_model_cpu_offload` and the sequential one), and
    diffusers' group offloading."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module
    from diffusers.hooks import apply_group_offloading

    from diffusers_ext.hooks._plan import find_run

    def offload(unet):
        if kind == "leaves":
            cpu_offload(unet, torch.device("cpu"))
        elif kind == "groups":
            device = torch.device("cpu")
            apply_group_offloading(unet, onload_device=device, offload_device=device, offload_type="leaf_level")
        else:
            cpu_offload_with_hook(unet, torch.device("cpu"))

    plain = conditional()
    before = [predict(plain, step) for step in range(4)]
    dx.enable(plain, dx.DeepCacheConfig(interval=2, branch=1))
    expected = [predict(plain, step) for step in range(4)]
    unet = conditional()
    if when == "before":
        offload(unet)
    dx.enable(unet, dx.DeepCacheConfig(interval=2, branch=1))
    if when == "after":
        offload(unet)
    assert find_run(unet, "deepcache") is not None
    for _ in range(2):
        assert all(torch.equal(predict(unet, step), expected[step]) for step in range(4))
    dx.disable(unet)
    assert all(torch.equal(predict(unet, step), before[step]) for step in range(4))
    remove_hook_from_module(unet, recurse=True)
    assert all(torch.equal(predict(unet, step), before[step]) for step in range(4))


@exact
def test_hooks_taken_off_by_another_library_are_noticed(pipe):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(pipe.unet, torch.device("cpu"))
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    remove_hook_from_module(pipe.unet, recurse=True)
    with pytest.raises(RuntimeError, match="taken off by another library"):
        picture(pipe)


@exact
def test_compiled_graphs_do_not_grow_with_steps():
    from torch._dynamo.testing import CompileCounterWithBackend

    unet = conditional()
    dx.enable(unet, dx.DeepCacheConfig(interval=3, branch=1))
    expected = [predict(unet, step) for step in range(7)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(unet, backend=counter)
    graphs = []
    for _ in range(3):
        results = [_compiled_predict(compiled, unet, step) for step in range(7)]
        graphs.append(counter.frame_count)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, expected, strict=True))
    assert graphs[0] == graphs[1] == graphs[2] <= 6
    torch._dynamo.reset()


@torch.no_grad()
def _compiled_predict(compiled, unet, step):
    from tests.unets import inputs

    return compiled(**inputs(unet, step), return_dict=False)[0]


@exact
def test_controlnet_residuals_still_add_up():
    unet, plain = conditional(), conditional()
    from tests.unets import inputs

    shapes = []
    call = inputs(plain, 0)
    handle = plain.mid_block.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape))
    with torch.no_grad():
        plain(**call)
        handle.remove()
        residuals = [torch.full((2, c, s, s), 0.1) for c, s in [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 2 + [(16, 2)] * 3]
        extra = {
            "down_block_additional_residuals": residuals,
            "mid_block_additional_residual": torch.full(shapes[0], 0.2),
        }
        expected = plain(**inputs(plain, 0), **extra, return_dict=False)[0]
        dx.enable(unet, dx.DeepCacheConfig(interval=2, branch=3))
        assert torch.equal(unet(**inputs(unet, 0), **extra, return_dict=False)[0], expected)
        assert unet(**inputs(unet, 1), **extra, return_dict=False)[0].shape == expected.shape


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "`interval` is 0"),
        ({"interval": 2.5}, "`interval` is 2.5"),
        ({"interval": True}, "`interval` is True"),
        ({"branch": -1}, "`branch` is -1"),
        ({"schedule": "cubic"}, "`schedule` is 'cubic'"),
        ({"schedule": "quad"}, "`center` is None"),
        ({"schedule": "quad", "center": 3, "power": 1.0}, "`power` is 1.0"),
        ({"center": 3}, "`center` is 3"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dx.DeepCacheConfig(**options)


@exact
def test_a_branch_that_the_model_does_not_have_changes_nothing():
    unet = conditional()
    attributes = {path: set(module.__dict__) for path, module in unet.named_modules()}
    with pytest.raises(ValueError, match="`branch` is 9; this UNet2DConditionModel has branches 0 to 8"):
        dx.enable(unet, dx.DeepCacheConfig(branch=9))
    with pytest.raises(ValueError, match="enable it on the pipeline"):
        dx.enable(unet, dx.DeepCacheConfig(schedule="quad", center=3))
    assert {path: set(module.__dict__) for path, module in unet.named_modules()} == attributes


@exact
def test_a_transformer_is_refused():
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    with pytest.raises(ValueError, match="does not work on DiTTransformer2DModel: it is no U-Net"):
        dx.enable(dit, dx.DeepCacheConfig())


@exact
def test_quad_counts_the_steps_of_the_pipeline(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=3, schedule="quad", center=2))
    run = pipe.unet.conv_in._diffusers_hook.hooks["diffusers_ext.deepcache.clock"].run
    modes, tick = [], run.tick

    def record(sample):
        tick(sample)
        modes.append(run.state.mode)

    run.tick = record
    pipe("a person", num_inference_steps=12, output_type="latent")
    assert [i for i, mode in enumerate(modes) if mode == "full"] == quad_steps(12, 3, 2, 1.4)


@exact
def test_bfloat16():
    unet = spatio_temporal().to(torch.bfloat16)
    dx.enable(unet, dx.DeepCacheConfig(interval=2, branch=1))
    from tests.unets import inputs

    with torch.no_grad():
        for step in range(3):
            call = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs(unet, step).items()}
            result = unet(**call, return_dict=False)[0]
            assert result.dtype == torch.bfloat16 and result.isfinite().all()


# --- reference -------------------------------------------------------------------------------------------------------


def golden_run(unet, scheduler, denoise):
    """The loop that made the golden numbers: 9 DDIM steps on formula weights; returns a few numbers of each latent."""
    scheduler.set_timesteps(9)
    latents = torch.sin(torch.arange(2 * 4 * 8 * 8, dtype=torch.float64)).float().reshape(2, 4, 8, 8)
    states = torch.cos(torch.arange(2 * 5 * 8, dtype=torch.float64)).float().reshape(2, 5, 8)
    numbers = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(denoise(unet, latents, t, states), t, latents, return_dict=False)[0]
            numbers.append(
                [latents.double().mean().item(), latents.double().std().item(), *latents[0, 0, 0, :3].tolist()]
            )
    return numbers


@pytest.mark.proof("reference")
@pytest.mark.parametrize("branch", range(9))
def test_equals_the_authors_package(branch):
    """Numbers of DeepCache 0.1.1; on 3 levels with 2 layers its `cache_branch_id` is our branch."""
    unet = conditional()
    dx.enable(unet, dx.DeepCacheConfig(interval=3, branch=branch))
    numbers = golden_run(
        unet,
        DDIMScheduler(clip_sample=False),
        lambda unet, x, t, states: unet(x, t, encoder_hidden_states=states, return_dict=False)[0],
    )
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(GOLDEN["runs"][str(branch)]), rtol=2e-4, atol=2e-4)


@pytest.mark.proof("reference")
def test_bit_equal_to_the_authors_package_where_it_is_installed():
    DeepCache = pytest.importorskip("DeepCache", reason="the authors' package DeepCache 0.1.1 is not installed")

    def denoise(unet, x, t, states):
        return unet(x, t, encoder_hidden_states=states, return_dict=False)[0]

    for branch in range(9):
        unet, scheduler = conditional(), DDIMScheduler(clip_sample=False)
        helper = DeepCache.DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
        helper.set_params(cache_interval=3, cache_branch_id=branch)
        helper.enable()
        theirs = golden_run(unet, scheduler, denoise)
        ours = conditional()
        dx.enable(ours, dx.DeepCacheConfig(interval=3, branch=branch))
        assert golden_run(ours, DDIMScheduler(clip_sample=False), denoise) == theirs


# --- claim -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("claim")
def test_the_recorded_result_holds_what_the_card_states():
    from diffusers_ext import proofs

    result = proofs.read_result("deepcache")
    names = [claim["name"] for claim in result["claims"]]
    for wanted in ("equal_macs_psnr", "time_over_package", "cached_step_over_listed_modules", "compiled_speedup"):
        assert any(name.startswith(wanted) for name in names), f"{wanted} was not measured"
    assert all(claim["holds"] in (True, False) for claim in result["claims"] if claim["goal"] is not None)


@pytest.mark.proof("claim")
def test_a_cached_run_is_nearer_to_the_full_run_than_one_that_skips_the_calls(pipe):
    """The cheapest form of the claim: at interval 2, reusing deep features beats reusing the whole prediction."""
    full = picture(pipe)
    with dx.enabled(pipe, dx.DeepCacheConfig(interval=2)):
        cached = picture(pipe)
    forward, last = pipe.unet.forward, []

    def every_second(*args, **kwargs):
        last.append(forward(*args, **kwargs) if len(last) % 2 == 0 else last[-1])
        return last[-1]

    pipe.unet.forward = every_second
    skipped = picture(pipe)
    del pipe.unet.forward
    assert 0 < abs(cached - full).mean() < abs(skipped - full).mean()


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_saved_pushed_and_loaded_in_a_fresh_process(pipe, tmp_path):
    from tests.fresh import run_fresh
    from tests.hub_server import HubServer

    dx.enable(pipe, dx.DeepCacheConfig(interval=3, branch=1))
    cached = picture(pipe)
    plain = picture(dx.disable(copy.deepcopy(pipe)))
    dx.save_pretrained(pipe, tmp_path / "repo")
    assert abs(cached - plain).max() > 1e-2  # so that 1e-5, the bound between processes, tells them apart
    torch.save({"cached": torch.from_numpy(cached), "plain": torch.from_numpy(plain)}, tmp_path / "expected.pt")
    code = f"""
        import sys, torch
        import diffusers
        def picture(pipe):
            pipe.set_progress_bar_config(disable=True)
            return torch.from_numpy(pipe("a person with tan skin", num_inference_steps=6, generator=torch.Generator().manual_seed(0),
                                         output_type="np").images)
        def same(picture, expected):  # another process may run other kernels: the last bits are not promised
            return (picture - expected).abs().max() <= 1e-5
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        folder = {str(tmp_path / "repo")!r}
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert "diffusers_ext" not in sys.modules
        assert same(picture(stock), expected["plain"]), "stock loading gives the plain pipeline"
        import diffusers_ext as dx
        ours = dx.Pipeline.from_pretrained(folder)
        assert [entry.key for entry in dx.status(ours)] == ["deepcache"]
        assert same(picture(ours), expected["cached"]), "dx.Pipeline gives it with DeepCache on"
        dx.push_to_hub(ours, "me/deepcache-avatars")
        pulled = dx.Pipeline.from_pretrained("me/deepcache-avatars")
        assert same(picture(pulled), expected["cached"])
        stock = diffusers.DiffusionPipeline.from_pretrained("me/deepcache-avatars")
        assert same(picture(stock), expected["plain"])
    """
    with HubServer() as hub:
        run_fresh(code, env=hub.env)
        files = hub.files("me/deepcache-avatars")
        assert "README.md" in files and "model_index.json" in files
        assert not any(name.endswith((".bin", ".pkl", ".pt", ".pth")) for name in files)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(pipe):
    from diffusers_ext.cards import method_card

    card = method_card("deepcache")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    before = picture(pipe)
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {"pipe": pipe})
    dx.disable(pipe) if dx.status(pipe) else None
    assert (picture(pipe) == before).all()
    assert "2312.00858" in card and "Apache-2.0" in card
