"""enable, disable, enabled, status, and the recipe that follows them. The hooks themselves: tests/methods."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx
from diffusers_ext import recipe
from diffusers_ext.enabling import HookConfig
from tests.unets import conditional


@dataclasses.dataclass
class OtherCacheConfig(HookConfig):
    """A second cache, which does nothing, to conflict with the first."""

    key: ClassVar[str] = "faster_diffusion"
    family: ClassVar[str] = "cache"

    @classmethod
    def supports(cls, module):
        return None if hasattr(module, "down_blocks") and hasattr(module, "conv_in") else "it is no U-Net"

    def check(self, module, on_pipeline):
        pass

    def apply(self, module):
        pass

    @classmethod
    def remove(cls, module):
        pass


def draw(pipe):
    return pipe("a person", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_on_and_off(pipe):
    before = draw(pipe)
    attributes, config = set(vars(pipe)), dict(pipe.config)
    assert dx.enable(pipe, dx.DeepCacheConfig(interval=2)) is pipe
    (entry,) = dx.status(pipe)
    assert (entry.key, entry.component, entry.config) == ("deepcache", "unet", dx.DeepCacheConfig(interval=2))
    assert not (draw(pipe) == before).all()
    assert dx.disable(pipe, "deepcache") is pipe
    assert dx.status(pipe) == [] and (draw(pipe) == before).all()
    assert set(vars(pipe)) == attributes and dict(pipe.config) == config


def test_enabling_again_replaces(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    twice = draw(pipe)
    dx.enable(pipe, dx.DeepCacheConfig(interval=4, branch=2))
    assert [entry.config.interval for entry in dx.status(pipe)] == [4]
    assert not (draw(pipe) == twice).all()
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    assert (draw(pipe) == twice).all()


def test_the_context_manager_puts_back_what_was_on(pipe):
    with pytest.raises(RuntimeError, match="inside"), dx.enabled(pipe, dx.DeepCacheConfig()):
        raise RuntimeError("inside")
    assert dx.status(pipe) == []
    dx.enable(pipe, dx.DeepCacheConfig(interval=5))
    with dx.enabled(pipe, dx.DeepCacheConfig(interval=2)) as same:
        assert same is pipe and dx.status(pipe)[0].config.interval == 2
    assert dx.status(pipe)[0].config.interval == 5


def test_conflicts_are_refused_and_change_nothing(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    expected = draw(pipe)
    with pytest.raises(ValueError, match="'faster_diffusion' cannot be on together with 'deepcache'"):
        dx.enable(pipe, OtherCacheConfig())
    with pytest.raises(ValueError, match="cannot be on together"):
        dx.enable(dx.disable(pipe), dx.DeepCacheConfig(interval=2), OtherCacheConfig())
    assert dx.status(pipe) == []
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    assert (draw(pipe) == expected).all()


def test_one_bad_setting_of_two_changes_nothing(pipe):
    with pytest.raises(ValueError, match="`branch` is 99"):
        dx.enable(pipe, OtherCacheConfig(), dx.DeepCacheConfig(branch=99))
    assert dx.status(pipe) == [] and "progress_bar" not in vars(pipe)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: dx.enable(pipe), "`configs` is empty"),
        (lambda pipe: dx.enable(pipe, {"interval": 2}), "allowed are instances of .*DeepCacheConfig"),
        (lambda pipe: dx.enable("pipe", dx.DeepCacheConfig()), "`target` is str"),
        (lambda pipe: dx.enable(pipe, dx.DeepCacheConfig(), component="unit"), "`component` is 'unit'.*unet"),
        (lambda pipe: dx.enable(pipe, dx.DeepCacheConfig(), component="vae"), "does not work on AutoencoderKL"),
        (lambda pipe: dx.disable(pipe, "deepcahce"), "Did you mean 'deepcache'"),
        (lambda pipe: dx.disable(pipe, "deepcache"), "'deepcache' is not on"),
    ],
)
def test_bad_input(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert dx.status(pipe) == []


def test_a_pipeline_without_a_unet_is_refused_with_the_reason():
    from diffusers import DiTPipeline, DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    pipe = DiTPipeline(transformer=dit, vae=None, scheduler=None)
    with pytest.raises(ValueError, match=r"DiTPipeline: transformer \(DiTTransformer2DModel\): it is no U-Net"):
        dx.enable(pipe, dx.DeepCacheConfig())


def test_pipelines_made_from_one_share_what_is_on(pipe):
    dx.enable(pipe, dx.DeepCacheConfig(interval=3))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert [entry.key for entry in dx.status(other)] == ["deepcache"]
    dx.disable(pipe)
    assert dx.status(other) == []


def test_a_compiled_model_is_unwrapped():
    unet = conditional()
    compiled = torch.compile(unet, backend="eager")
    dx.enable(compiled, dx.DeepCacheConfig())
    assert [entry.key for entry in dx.status(unet)] == ["deepcache"]
    dx.disable(compiled)
    assert dx.status(unet) == []


def test_progress_bars_still_show(pipe, capfd, monkeypatch):
    dx.enable(pipe, dx.DeepCacheConfig())
    with pipe.progress_bar(total=3) as bar:
        bar.update()
        assert bar.n == 1 or bar.disable
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipe_follows_what_is_on_and_survives_stock_saving(pipe, tmp_path):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2, branch=1))
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "model_index.json").read_text())[recipe.RECIPE_KEY]
    assert stored == recipe.collect(pipe)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert dx.status(stock) == []
    recipe.apply(stock, stored)
    stock.set_progress_bar_config(disable=True)
    assert (draw(stock) == expected).all()
    dx.disable(pipe)
    assert recipe.collect(pipe) is None and recipe.RECIPE_KEY not in pipe.config


GOOD = {"schema": 1, "methods": [{"method": "deepcache", "version": 1, "component": "unet", "config": {"interval": 2}}]}


def changed(**changes):
    bad = copy.deepcopy(GOOD)
    bad["methods"][0].update(changes)
    return bad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**GOOD, "schema": 2}, "schema 2, and this diffusers_ext reads up to 1"),
        ({"schema": 1}, "must be an object"),
        ([], "must be an object"),
        (changed(method="no_such_method"), "asks for method 'no_such_method', version 1, which is not installed"),
        (changed(method="hipa"), "'hipa', version 1, which is not installed"),
        (changed(version=7), "version 7, which is installed up to version 1"),
        (changed(config={"interval": 0}), "`interval` is 0"),
        (changed(config={"speed": 3}), r"settings \['speed'\]; allowed are"),
        (changed(method=3), "needs a name `method`"),
    ],
)
def test_bad_recipes(bad, message, pipe):
    with pytest.raises(ValueError, match=message):
        recipe.validate(bad)
    with pytest.raises(ValueError, match=message):
        recipe.apply(pipe, bad)
    assert dx.status(pipe) == []


def test_an_unknown_method_is_skipped_on_request(pipe):
    mixed = {"schema": 1, "methods": [changed(method="no_such_method")["methods"][0], GOOD["methods"][0]]}
    with pytest.warns(UserWarning, match="no_such_method.*left out"):
        recipe.apply(pipe, mixed, skip_unknown=True)
    assert [entry.key for entry in dx.status(pipe)] == ["deepcache"]


def test_a_recipe_for_a_component_that_is_not_there(pipe):
    with pytest.raises(ValueError, match="`component` is 'prior'"):
        recipe.apply(pipe, changed(component="prior"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "schema": json_values | st.just(1),
            "methods": json_values
            | st.lists(
                st.fixed_dictionaries(
                    {"method": st.just("deepcache") | st.text(max_size=9)},
                    optional={
                        "version": json_values,
                        "component": json_values,
                        "config": json_values
                        | st.dictionaries(st.sampled_from(["interval", "branch", "schedule"]), json_values),
                    },
                ),
                max_size=3,
            ),
        },
    )
    | json_values
)
def test_whatever_a_file_holds_is_accepted_or_refused_with_a_reason(content):
    """A recipe comes from strangers: nothing but a ValueError may come out of reading it."""
    try:
        pairs = recipe.validate(content)
    except ValueError as error:
        assert str(error)
    else:
        assert all(isinstance(config, HookConfig) for _, config in pairs)
