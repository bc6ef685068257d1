"""Test classes of diffusers' own suites, one for each class of ours that they fit. Run by `test_upstream_suites.py`.

In the process that runs this, `difftests` is the folder `tests` of a diffusers checkout. The suites are made for diffusers'
own classes and ask for some things that ours need not have: those tests are skipped here with the reason.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from diffusers.utils import is_torchsde_available

from tests.common import model, pipeline, planted, scheduler, test_the_suites, upstream
from tests.common.arguments import arguments
from tests.common.models import World
from tests.common.suite import Case

# Planted methods show that the suites run at all, also where no method of a form is registered.
planted.install()


def cases(suite: Any, key: str) -> list[Case]:
    """The registered methods of a suite's form, and the right planted one."""
    registered = [case for case in suite.cases() if case.row.key not in planted.ROWS]
    return [*registered, test_the_suites.case_of(key)[1]]


def name_of(case: Case) -> str:
    return "Test_" + re.sub(r"\W", "_", f"{case.row.key}_{case.cls.__name__}")


def left_out(reason: str) -> Any:
    """A test that says why it is not run."""

    def test(self: Any) -> None:
        pytest.skip(reason)

    return test


def told(case: Case) -> dict[str, Any]:
    """Tests that the method says do not hold for it."""
    return {name: left_out(reason) for name, reason in case.common.upstream_skips.items()}


# --- schedulers ------------------------------------------------------------------------------------------------------

from difftests.schedulers import test_schedulers as upstream_schedulers  # noqa: E402

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def scheduler_suite(case: Case) -> type:
    names = arguments(case.cls)
    config = {**{name: value for name, value in BETAS.items() if name in names}, **case.settings[0]}
    body: dict[str, Any] = {
        "scheduler_classes": (case.cls,),
        "forward_default_kwargs": (("num_inference_steps", 50),),
        "get_scheduler_config": lambda self, **changes: {**config, **changes},
        **told(case),
    }
    if "trained_betas" not in names:
        body["test_trained_betas"] = left_out("it takes no `trained_betas`")
    if not hasattr(case.cls, "add_noise"):
        body["test_add_noise_device"] = left_out("it has no `add_noise`")
    if not hasattr(case.cls, "scale_model_input"):
        body["test_scheduler_public_api"] = left_out("it has no `scale_model_input`")
    if not case.cls._compatibles:
        body["test_compatibles"] = left_out("it names no `_compatibles`")
    elif not is_torchsde_available():
        body["test_compatibles"] = left_out("torchsde, which one of the compatible schedulers needs, is not installed")
    return type(name_of(case), (upstream_schedulers.SchedulerCommonTest,), body)


scheduler_cases = cases(scheduler.SUITE, "planted_scheduler")
scheduler_cases += [case for case in upstream.SUITE.cases() if scheduler.SUITE.fits(case.cls)]
for case in scheduler_cases:
    if scheduler.is_known(case):  # the suite's samples are real numbers, and its processes those of diffusers
        globals()[name_of(case)] = scheduler_suite(case)


# --- models ----------------------------------------------------------------------------------------------------------

from difftests.models import testing_utils as upstream_models  # noqa: E402

# Each mixin in a class of its own: some are marked as a whole to be skipped without an accelerator.
MIXINS = ("ModelTesterMixin", "TrainingTesterMixin", "MemoryTesterMixin")


def model_suite(case: Case, mixin: str) -> type:
    built = model.build(case)
    given = model.call(case, built)
    first = next(name for name in inspect.signature(case.cls.forward).parameters if name != "self")
    body: dict[str, Any] = {
        "model_class": case.cls,
        "main_input_name": first,
        "input_shape": tuple(given[first].shape[1:]),
        "output_shape": tuple(model.output(case, built).shape[1:]),
        "generator": property(lambda self: torch.Generator().manual_seed(0)),
        "get_init_dict": lambda self: dict(case.settings[0]),
        "get_dummy_inputs": lambda self: model.call(case, built),
        **told(case),
    }
    bases = (upstream_models.BaseModelTesterConfig, getattr(upstream_models, mixin))
    return type(f"{name_of(case)}_{mixin}", bases, body)


for case in cases(model.SUITE, "planted_model"):
    for mixin in MIXINS:
        globals()[f"{name_of(case)}_{mixin}"] = model_suite(case, mixin)


# --- pipelines -------------------------------------------------------------------------------------------------------

try:
    from difftests.pipelines import test_pipelines_common as upstream_pipelines
except ImportError as error:
    upstream_pipelines, _missing = None, str(error)


def pipeline_suite(case: Case, world: World) -> type:
    import unittest

    pipe = pipeline.build(case, world)
    given = pipeline.call(case, pipe)
    parameters = set(inspect.signature(pipe.__call__).parameters)

    def components(self: Any) -> dict[str, Any]:
        made = pipeline.build(case, world)
        options = {
            name: made.config[name] for name in inspect.signature(case.cls).parameters if name not in made.components
        }
        return {**made.components, **options}

    def inputs(self: Any, device: Any, seed: int = 0) -> dict[str, Any]:
        generator = {"generator": torch.Generator().manual_seed(seed)} if "generator" in parameters else {}
        output = {"output_type": "np"} if "output_type" in parameters else {}
        return {**pipeline.call(case, pipe), **output, **generator}

    common = upstream_pipelines.PipelineTesterMixin
    body: dict[str, Any] = {
        "pipeline_class": case.cls,
        "params": frozenset(given),
        "batch_params": frozenset({"prompt", "negative_prompt", "image"} & set(given)),
        "required_optional_params": common.required_optional_params & parameters,
        "test_attention_slicing": False,
        "test_xformers_attention": False,
        "get_dummy_components": components,
        "get_dummy_inputs": inputs,
        **told(case),
    }
    if not body["batch_params"]:
        for name in ("test_inference_batch_consistent", "test_inference_batch_single_identical"):
            body[name] = left_out("nothing that it takes comes in batches")
    if "encode_prompt" not in vars(case.cls):
        body["test_encode_prompt_works_in_isolation"] = left_out("it has no `encode_prompt` of its own")
    return type(name_of(case), (common, unittest.TestCase), body)


if upstream_pipelines is None:

    @pytest.mark.skip(reason=f"the pipeline suite cannot be imported: {_missing}")
    def test_pipelines() -> None: ...

else:
    import tempfile
    from pathlib import Path

    for case in cases(pipeline.SUITE, "planted_pipeline"):
        globals()[name_of(case)] = pipeline_suite(case, World(Path(tempfile.mkdtemp(prefix="upstream-"))))

del case
