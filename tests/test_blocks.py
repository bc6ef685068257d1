"""Blocks of transformers under a plan, on stock classes of many architectures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from diffusers_ext.hooks import _blocks
from diffusers_ext.hooks._blocks import BlockPlan, Streams, block_lists, block_names, groups_of, lagrange
from diffusers_ext.hooks._plan import Call, PlanBuilder, find_run, uninstall

from .common.traces import require_unchanged, trace
from .transformers import TRANSFORMERS, block_deltas, predict_with, states_of
from .unets import UNETS

# Class -> its blocks by list. Latte's lists take turns; the others run one after the other.
BLOCKS = {
    "DiTTransformer2DModel": {"transformer_blocks": 3},
    "FluxTransformer2DModel": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "SD3Transformer2DModel": {"transformer_blocks": 2},
    "AllegroTransformer3DModel": {"transformer_blocks": 3},
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": 2, "single_transformer_blocks": 2},
    "ChromaTransformer2DModel": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "CogVideoXTransformer3DModel": {"transformer_blocks": 3},
    "CogView4Transformer2DModel": {"transformer_blocks": 3},
    "EasyAnimateTransformer3DModel": {"transformer_blocks": 3},
    "Flux2Transformer2DModel": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "HiDreamImageTransformer2DModel": {"double_stream_blocks": 2, "single_stream_blocks": 2},
    "HunyuanDiT2DModel": {"blocks": 4},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "Kandinsky5Transformer3DModel": {"visual_transformer_blocks": 3},
    "LTX2VideoTransformer3DModel": {"transformer_blocks": 3},
    "LTXVideoTransformer3DModel": {"transformer_blocks": 3},
    "LatteTransformer3DModel": {"transformer_blocks": 2, "temporal_transformer_blocks": 2},
    "Lumina2Transformer2DModel": {"layers": 3},
    "LuminaNextDiT2DModel": {"layers": 3},
    "MochiTransformer3DModel": {"transformer_blocks": 3},
    "PRXTransformer2DModel": {"blocks": 3},
    "PixArtTransformer2DModel": {"transformer_blocks": 3},
    "PriorTransformer": {"transformer_blocks": 3},
    "QwenImageTransformer2DModel": {"transformer_blocks": 3},
    "SanaTransformer2DModel": {"transformer_blocks": 3},
    "SkyReelsV2Transformer3DModel": {"blocks": 3},
    "StableAudioDiTModel": {"transformer_blocks": 3},
    "WanTransformer3DModel": {"blocks": 3},
    "ZImageTransformer2DModel": {"layers": 3},
}
SUPPORTED = [name for name in TRANSFORMERS if name != "PRXTransformer2DModel"]
DOUBLE = [
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "PixArtTransformer2DModel",
]


class Full:
    """A plan with a full step where `is_full(step)`, and a cached one elsewhere."""

    def __init__(self, is_full: Callable[[int], bool] = lambda step: step % 2 == 0) -> None:
        self.is_full = is_full

    def mode(self, call: Call) -> str:
        return "full" if self.is_full(call.step) else "cached"


def leave_out(model: nn.Module, groups: Sequence[Sequence[str]], order: int | None = 0, plan: Any = None) -> BlockPlan:
    """Hooks that leave these groups out of cached steps."""
    blocks = BlockPlan(PlanBuilder(model, "test", plan or Full()))
    for names in groups:
        blocks.leave_out("cached", names, order)
    blocks.install().begin(None)
    return blocks


def off(model: nn.Module) -> None:
    uninstall(model, "test")


# --- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_are_found_in_the_order_in_which_they_run(name):
    model = TRANSFORMERS[name].make()
    assert {name: len(blocks) for name, blocks in block_lists(model).items()} == BLOCKS[name]
    ran: list[str] = []
    for block in block_names(model):
        model.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
    TRANSFORMERS[name].predict(model)
    assert ran == block_names(model)


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_states_of_each_block_are_found(name):
    model = TRANSFORMERS[name].make()
    blocks = leave_out(model, [block_names(model)])
    TRANSFORMERS[name].predict(model)
    for block, hook in blocks._hooks.items():
        assert tuple(hook.streams.roles) == states_of(model, block), block


def test_groups_are_neighbours_of_one_list():
    model = TRANSFORMERS["FluxTransformer2DModel"].make()
    assert groups_of(model, reversed(block_names(model))) == [
        ["transformer_blocks.0", "transformer_blocks.1"], ["single_transformer_blocks.0", "single_transformer_blocks.1"]
    ]  # fmt: skip
    assert groups_of(model, ["transformer_blocks.1"]) == [["transformer_blocks.1"]]
    model = TRANSFORMERS["DiTTransformer2DModel"].make()
    assert groups_of(model, ["transformer_blocks.0", "transformer_blocks.2"]) == [
        ["transformer_blocks.0"], ["transformer_blocks.2"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "LatteTransformer3DModel"])
def test_blocks_are_alone_where_the_model_reads_what_comes_out_of_single_ones(name):
    model = TRANSFORMERS[name].make()
    assert groups_of(model, block_names(model)) == [[block] for block in block_names(model)]


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_refused(name):
    assert _blocks.unsupported(UNETS[name](1)) == "it has no list of transformer blocks"


def test_one_block_is_refused():
    model = TRANSFORMERS["DiTTransformer2DModel"].make()
    model.transformer_blocks = model.transformer_blocks[:1]
    assert _blocks.unsupported(model) == "it has one transformer block only"


def test_a_model_that_embeds_its_timesteps_outside_of_its_parts_is_refused():
    assert _blocks.unsupported(TRANSFORMERS["PRXTransformer2DModel"].make()) == "none of its parts takes the timesteps"


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_computing_everything_is_bit_equal_and_off_is_off(name):
    model = TRANSFORMERS[name]
    hooked = model.make()
    plain, before = model.run(hooked, 2), trace(hooked)
    leave_out(hooked, [block_names(hooked)], plan=Full(lambda step: True))
    assert all(torch.equal(a, b) for a, b in zip(model.run(hooked, 2), plain, strict=True))
    off(hooked)
    leave_out(hooked, [block_names(hooked)])
    assert not torch.equal(model.run(hooked, 2)[1], plain[1])
    off(hooked)
    require_unchanged(hooked, before, "after on and off")
    assert all(torch.equal(a, b) for a, b in zip(model.run(hooked, 2), plain, strict=True))


def replay(name: str, dtype: torch.dtype, order: int = 0) -> float:
    """How far a step of all deltas is from a full step of the same inputs."""
    model = TRANSFORMERS[name]
    hooked = model.make().to(dtype)
    leave_out(hooked, [block_names(hooked)], order)
    full, cached = (model.predict(hooked) for _ in range(2))
    return float((full - cached).abs().max() / full.abs().max())


@pytest.mark.parametrize("name", SUPPORTED)
def test_deltas_of_the_same_inputs_give_the_same_output(name):
    assert replay(name, torch.float32) < 1e-5


@pytest.mark.parametrize("name", DOUBLE)
def test_deltas_of_the_same_inputs_give_the_same_output_in_float64(name):
    assert replay(name, torch.float64) < 1e-10


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_cached_step_equals_the_slow_derivation(name):
    """Each block's own delta of step 0, added to the states of step 1 by hand, for some blocks and for all."""
    model = TRANSFORMERS[name]
    bare = model.make()
    for names in (block_names(bare), block_names(bare)[1:], block_names(bare)[:-1], block_names(bare)[::2]):
        deltas = block_deltas(bare, names, lambda: model.predict(bare, 0))
        expected = predict_with(bare, deltas, lambda: model.predict(bare, 1))
        leave_out(bare, [names])
        model.predict(bare, 0)
        found = model.predict(bare, 1)
        off(bare)
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", DOUBLE)
def test_a_group_equals_each_of_its_blocks_alone(name):
    model = TRANSFORMERS[name]
    bare, outputs = model.make().double(), []
    for groups in ([block_names(bare)], [[block] for block in block_names(bare)]):
        blocks = leave_out(bare, groups)
        outputs.append(model.run(bare, 2)[1])
        counts = len(blocks._groups)
        off(bare)
    assert counts == len(block_names(bare)) > len(groups_of(bare, block_names(bare)))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-10


def test_blocks_that_only_pass_add_nothing():
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make()
    names = block_names(bare)[1:]
    nothing = {name: [torch.zeros(())] for name in names}
    expected = predict_with(bare, nothing, lambda: model.predict(bare, 1))
    blocks = leave_out(bare, [names], order=None)
    assert torch.equal(model.run(bare, 2)[1], expected)
    assert all(slot.value is None for slot in blocks.builder.run.state.slots)


def test_what_the_model_adds_between_blocks_still_goes_in():
    """Residuals of a ControlNet, those of the step itself."""
    model = TRANSFORMERS["FluxTransformer2DModel"]
    bare = model.make()

    @torch.no_grad()
    def controlled(step: int) -> torch.Tensor:
        residuals = [torch.full((2, 4, 16), 0.1 * (step + 1))] * 2
        return bare(**model.call(bare, step), controlnet_block_samples=residuals, return_dict=False)[0]

    deltas = block_deltas(bare, block_names(bare), lambda: controlled(0))
    expected = predict_with(bare, deltas, lambda: controlled(1))
    leave_out(bare, [block_names(bare)])
    controlled(0)
    torch.testing.assert_close(controlled(1), expected, atol=1e-5, rtol=0)


def test_a_deep_copy_counts_for_itself():
    model = TRANSFORMERS["FluxTransformer2DModel"]
    bare = model.make()
    leave_out(bare, [block_names(bare)])
    expected = model.run(bare, 2)
    clone = copy.deepcopy(bare)
    find_run(clone, "test").begin(None)
    find_run(bare, "test").begin(None)
    for step in range(2):  # calls that alternate
        assert torch.equal(model.predict(clone, step), expected[step])
        assert torch.equal(model.predict(bare, step), expected[step])


@pytest.mark.parametrize(("name", "taken"), [("DiTTransformer2DModel", False), ("WanTransformer3DModel", True)])
def test_hooks_that_another_library_takes_off_are_noticed(name, taken):
    """accelerate hooks modules that have weights themselves: blocks of Wan, and not those of DiT, which keep ours."""
    model = TRANSFORMERS[name]
    bare = model.make()
    cpu_offload(bare, torch.device("cpu"))
    leave_out(bare, [block_names(bare)])
    expected = model.run(bare, 2)
    remove_hook_from_module(bare, recurse=True)
    if taken:
        with pytest.raises(RuntimeError, match="taken off by another library"):
            find_run(bare, "test")
    else:
        find_run(bare, "test").begin(None)
        assert all(torch.equal(a, b) for a, b in zip(model.run(bare, 2), expected, strict=True))


# --- continued deltas ------------------------------------------------------------------------------------------------


class _Drift(nn.Module):
    """Adds a polynomial in the time to two streams."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor):
        self.calls += 1
        drift = sum(c * temb**power for power, c in enumerate(self.coefficients))
        return hidden_states + drift, encoder_hidden_states - 2 * drift


class _Drifting(nn.Module):
    """Two blocks of `_Drift`. The time falls by one a step."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Drift([c * (i + 1) for c in coefficients]) for i in range(2))
        self.time_proj = nn.Identity()

    def forward(self, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time, prompt = self.time_proj(timestep), x[:1]
        for block in self.blocks:
            x, prompt = block(x, prompt, temb=time)
        return x + prompt


@pytest.mark.parametrize("full", [(0, 1, 2), (0, 2, 3), (0, 1, 4)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_continuation_is_exact_for_polynomials_of_its_order(order, full):
    """And not for one more: the test would notice a higher order."""
    for degree in (order, order + 1):
        model = _Drifting([0.3, -0.7, 0.2, 0.05][: degree + 1])
        plain, x = copy.deepcopy(model), torch.randn((2, 3), generator=torch.Generator().manual_seed(0)).double()
        leave_out(model, [block_names(model)], order, plan=Full(lambda step: step in full))
        for step in range(8):
            time = torch.tensor(9.0 - step).double()
            error = (model(time, x) - plain(time, x)).abs().max()
            if step > full[-1]:
                assert (error < 1e-10) == (degree == order), (degree, step)
        assert [block.calls for block in model.blocks] == [len(full)] * 2


def test_with_fewer_full_steps_than_the_order_needs_a_lower_one_is_taken():
    model = _Drifting([0.3, -0.7])
    plain, x = copy.deepcopy(model), torch.ones(2, 3).double()
    leave_out(model, [block_names(model)], 2, plan=Full(lambda step: step < 2))
    for step in range(4):
        time = torch.tensor(9.0 - step).double()
        assert (model(time, x) - plain(time, x)).abs().max() < 1e-10


def test_lagrange_weights():
    assert lagrange([3], 9) == [1.0]
    assert lagrange([0, 2], 3) == [-0.5, 1.5]
    assert lagrange([0, 1, 2], 3) == [1.0, -3.0, 3.0]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_group_keeps_order_plus_one_deltas_and_the_end_of_a_run_frees_them(order):
    model = TRANSFORMERS["FluxTransformer2DModel"]
    bare = model.make()
    blocks = leave_out(bare, [block_names(bare)], order, plan=Full(lambda step: True))
    run = blocks.builder.run
    for step in range(6):
        model.predict(bare, step)
        kept = [len(slot.value._values) for slot in run.state.slots]
        assert kept == [min(step, order) + 1] * 2
    shapes = [value.shape for slot in run.state.slots for stored in slot.value._values for value in stored.values()]
    assert len(shapes) == 2 * 2 * (order + 1)  # two groups of two streams, however many blocks
    run.end()
    assert run.state.slots == [] and run.manager._state_cache == {}


# --- what cannot be told ---------------------------------------------------------------------------------------------


class _Blurred(nn.Module):
    def forward(self, hidden_states, other_hidden_states):
        return other_hidden_states, hidden_states


def test_states_that_look_alike_are_refused():
    streams = Streams(_Blurred())
    inputs = {"hidden_states": torch.zeros(2, 3), "other_hidden_states": torch.zeros(2, 3)}
    with pytest.raises(TypeError, match=re.escape("_Blurred returns states of shapes") + ".*cannot be told"):
        streams.read(inputs, (inputs["other_hidden_states"], inputs["hidden_states"]))


def test_states_of_different_shapes_are_told_apart():
    streams = Streams(_Blurred())
    inputs = {"hidden_states": torch.zeros(2, 3), "other_hidden_states": torch.ones(2, 5)}
    states = streams.read(inputs, (inputs["other_hidden_states"], inputs["hidden_states"]))
    assert states == inputs and streams.roles == ["other_hidden_states", "hidden_states"]


def test_a_step_that_leaves_out_before_a_full_one_is_an_error():
    model = TRANSFORMERS["DiTTransformer2DModel"]
    bare = model.make()
    leave_out(bare, [block_names(bare)], plan=Full(lambda step: step > 0))
    with pytest.raises(RuntimeError, match="before a full step"):
        model.predict(bare)
