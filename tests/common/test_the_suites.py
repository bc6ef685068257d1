"""The suites under test: every rule holds for the planted methods that are right, and each broken one is caught by its rule."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys

import pytest
import torch
from diffusers import DDIMScheduler

import diffusers_ext as dx
from diffusers_ext import registry
from tests import unets
from tests.common import planted
from tests.common.models import World
from tests.common.suite import Broken, CommonCase

SUITES = {
    form: importlib.import_module(f"tests.common.{form}").SUITE
    for form in (
        "scheduler", "hook", "pipeline", "model", "adapter", "quantizer", "guider", "attn_processor", "latent_optimizer",
        "trainer", "metric", "upstream",
    )
}  # fmt: skip
KNOWN = [((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])), 2.0)]


def make_pipeline(name: str = "PlantedPipeline"):
    return registry.load_entry(name)(unet=unets.unconditional(1), scheduler=DDIMScheduler(clip_sample=False), gain=0.5)


# One of each kind that the planted methods support or not; the real methods meet them all.
ONLY = (
    "UNet2DConditionModel", "UNet2DModel", "DiTTransformer2DModel", "BertForMaskedLM", "avatars-sd", "tiny-ddpm",
    "tiny-dit", "tiny-flux", "tiny-text",
)  # fmt: skip
COMMONS = {
    "planted_pipeline": CommonCase(make=make_pipeline, inputs=lambda steps: {"num_inference_steps": steps}),
    "planted_model": CommonCase(inputs=planted.vectors),
    "planted_lora": CommonCase(make=planted.write_lora),
    "planted_trainer": CommonCase(inputs=lambda folder: {}),
    "planted_error": CommonCase(known=KNOWN, inputs=planted.pair),
}

# (key whose place it takes, module and name of the broken one, rule that must catch it)
BROKEN = [
    ("planted_scheduler", f"scheduling.{name}", rule)
    for name, rule in [
        ("DropsAnArgument", "config_round_trip"),
        ("LosesATensor", "config_round_trip"),
        ("HidesArguments", "interface"),
        ("TakesPositions", "positional_arguments"),
        ("TakesAnything", "wrong_arguments"),
        ("TakesAnyNumber", "wrong_calls"),
        ("NoGenerator", "interface"),
        ("WrongMaths", "gaussian"),
        ("WrongForOneType", "gaussian"),
        ("KeepsState", "runs_leave_nothing"),
        ("KeepsState", "stock_pipelines"),
        ("SharesState", "instances_share_nothing"),
        ("CopiesNothing", "deepcopy"),
        ("TooLoud", "first_noise_level"),
        ("WrongNoise", "adding_noise"),
        ("BeginsAtTheStart", "start_in_the_middle"),
        ("WrongOrder", "timesteps"),
        ("NotOnTheDevice", "timesteps"),
        ("Upcasts", "step_output"),
        ("WritesIntoTheSample", "step_output"),
        ("Overflows", "any_number_of_steps"),
        ("NeedsThePackage", "travels"),
    ]
] + [
    ("planted_hook", f"hooking.{name}", rule)
    for name, rule in [
        ("ClampsItsSetting", "config_round_trip"),
        ("LostInARecipe", "config_round_trip"),
        ("TakesAnySetting", "wrong_settings"),
        ("AnotherKey", "names"),
        ("DoesNothing", "has_an_effect"),
        ("HalfApplies", "refusals_change_nothing"),
        ("FailsInUse", "refusals_change_nothing"),
        ("LeavesAForward", "off_is_bit_equal"),
        ("LeavesAnEffect", "off_is_bit_equal"),
        ("SharesState", "targets_share_nothing"),
        ("NoticesNoRun", "runs_leave_nothing"),
        ("CopiesTheOriginal", "deepcopy"),
        ("Upcasts", "bfloat16"),
        ("BreaksTheGraph", "compiled_eagerly"),
        ("OnTheRoot", "offloading"),
        ("CopiesTheOriginal", "noticed_when_taken_off"),
    ]
] + [
    ("planted_pipeline", f"pipelining.{name}", rule)
    for name, rule in [
        ("KeepsTheLastPicture", "calls"),
        ("LosesItsGain", "components"),
        ("LosesItsGain", "save_and_load"),
        ("HiddenOption", "components"),
        ("ChangesAWeight", "calls_change_nothing"),
        ("TakesAnyOutputType", "wrong_calls"),
        ("CountsFromOne", "callbacks"),
        ("HidesItsLoop", "methods_notice_its_runs"),
        ("KeepsTheLastPicture", "two_pipelines"),
        ("PipelineNeedsThePackage", "travels"),
    ]
] + [
    ("planted_model", f"modeling.{name}", rule)
    for name, rule in [
        ("IgnoresAnArgument", "config_round_trip"),
        ("TakesAnyWidth", "wrong_arguments"),
        ("RemembersItsInput", "calls"),
        ("HasADeadLayer", "gradients"),
        ("LosesABuffer", "save_and_load"),
        ("RemembersItsInput", "copies"),
        ("Upcasts", "bfloat16"),
    ]
] + [
    ("planted_adapter", "modeling.StaysAttached", "on_and_off"),
    ("planted_adapter", "modeling.AttachesHalf", "refusals_change_nothing"),
    ("planted_adapter", "modeling.AddsUp", "attached_twice"),
    ("planted_adapter", "modeling.SavesNothing", "save_and_load"),
    ("planted_quantizer", "quantizing.LosesTheScales", "close_and_small"),
    ("planted_quantizer", "quantizing.KeepsTheWeights", "close_and_small"),
    ("planted_quantizer", "quantizing.IsRandom", "repeatable"),
    ("planted_quantizer", "quantizing.RefusesLate", "refusals_change_nothing"),
    ("planted_guider", "guiding.LosesItsScale", "guider_config_round_trip"),
    ("planted_guider", "guiding.GuidesAlways", "guidance"),
    ("planted_guider", "guiding.Amplifies", "nothing_to_guide"),
    ("planted_guider", "guiding.Remembers", "guided_runs_leave_nothing"),
    ("planted_attention", "guiding.PutsOthersBack", "processors"),
    ("planted_attention", "guiding.SwitchesTheBackend", "global_backend"),
    ("planted_noise", "learning.LeavesGradients", "pipeline_unchanged"),
    ("planted_noise", "learning.WritesIntoTheLatents", "better_latents"),
    ("planted_error", "learning.wrong_error", "known_answers"),
    ("planted_error", "learning.writing_error", "known_answers"),
    ("planted_error", "learning.ResetsHalf", "streaming"),
    ("planted_error", "learning.SharesItsTotal", "instances_share_nothing"),
    ("planted_error", "learning.ComputesNothing", "nothing_to_compute"),
]  # fmt: skip


def case_of(key: str, entry: str = "", faulty: object = None):
    """The case of a planted row, with another class in its place where one is given."""
    row = registry.get_method(key)
    common = COMMONS.get(key, CommonCase())
    (case,) = SUITES[row.form].cases_of(row, common)
    if faulty is None:
        return SUITES[row.form], case
    if key == "planted_pipeline":
        common = dataclasses.replace(common, make=functools.partial(make_pipeline, entry.partition(".")[2]))
    return SUITES[row.form], dataclasses.replace(
        case, cls=faulty, entries=(faulty, *case.entries[1:]), common=common, name=entry
    )


@pytest.fixture(scope="module")
def found():
    """The planted classes by module and name, in the package for the time of these tests."""
    yield planted.install()
    planted.uninstall()


@pytest.fixture(scope="module")
def planted_world(found, tmp_path_factory):
    """A world whose journey carries all planted methods that travel."""
    travellers = []
    for key in planted.ROWS:
        suite, case = case_of(key)
        if suite.pack is not None and "travels" in suite.rules:
            travellers.append((suite, case))
    for key, entry, rule in BROKEN:
        if rule == "travels":
            travellers.append(case_of(key, entry, found[entry]))
    return World(tmp_path_factory.mktemp("planted"), travellers, "tests.common.planted:install", ONLY)


@pytest.mark.parametrize("key", planted.ROWS)
def test_what_is_right_breaks_no_rule(key, planted_world):
    suite, case = case_of(key)
    compiled = () if key == "planted_model" else ("compiled_eagerly",)  # takes long; DeepCache goes through it
    assert suite.broken(case, planted_world, leave_out=compiled) == {}


@pytest.mark.parametrize(("key", "entry", "rule"), BROKEN, ids=lambda value: value)
def test_what_is_broken_is_caught(key, entry, rule, found, planted_world):
    suite, case = case_of(key, entry, found[entry])
    with pytest.raises(Broken, match=rf"{re.escape(entry)} breaks the rule `{rule}` of form {suite.form}"):
        suite.run(case, suite.rules[rule], planted_world)


def test_a_trainer_that_resumes_without_its_momentum_is_caught(found, planted_world, monkeypatch):
    module = sys.modules[f"{planted.PACKAGE}.learning"]
    monkeypatch.setattr(module, "main", lambda argv: module.train(module.parse_args(argv), restore=False))
    suite, case = case_of("planted_trainer")
    with pytest.raises(Broken, match="resumed after one of two steps, other bits in"):
        suite.run(case, suite.rules["exact_resume"], planted_world)


def test_a_lora_that_does_nothing_is_caught(found, planted_world):
    suite, case = case_of("planted_lora")
    case = dataclasses.replace(case, common=CommonCase(make=functools.partial(planted.write_lora, scale=0.0)))
    with pytest.raises(Broken, match="on, it changes nothing"):
        suite.run(case, suite.rules["on_and_off"], planted_world)


def test_a_row_without_a_class_of_its_form_is_caught(found, planted_world):
    row = registry.Method("planted_x", "x", "other", "scheduler", entry=("planted_loss",))
    suite = SUITES["scheduler"]
    (case,) = suite.cases_of(row, CommonCase())
    assert [rule.name for rule in suite.rules_of(case)] == ["entry"]
    with pytest.raises(Broken, match=r"planted_x breaks the rule `entry`.*one of them must be a class derived from"):
        suite.run(case, suite.rules["entry"], planted_world)


def test_every_form_has_a_suite_and_every_suite_its_tests():
    assert set(SUITES) == set(registry.FORMS) - {"none"}
    for form, suite in SUITES.items():
        assert suite.form == form
        module = importlib.import_module(f"tests.common.test_{form}")
        assert module.SUITE is suite
        for rule in suite.rules.values():
            assert len(rule.says.split()) > 5, f"{form}: {rule.name} does not say what must be true"


def test_every_registered_method_of_a_form_is_a_case():
    for form, suite in SUITES.items():
        keys = {row.key for row in dx.methods() if row.form == form and row.entry}
        assert {case.row.key for case in suite.cases()} == keys
    assert any(case.name == "deepcache" for case in SUITES["hook"].cases())


def test_a_method_of_another_package_is_a_case(found, monkeypatch):
    row = registry.Method("other_hook", "x", "other", "hook", entry=(f"{planted.PACKAGE}.hooking.PlantedHookConfig",))
    monkeypatch.setattr(registry, "_third_party", lambda: {row.key: row})
    (case,) = [case for case in SUITES["hook"].cases() if case.row.key == "other_hook"]
    assert case.cls is found["hooking.PlantedHookConfig"] and case.own
    ids = {param.id for param in SUITES["hook"].params()}
    assert {"other_hook-off_is_bit_equal", "deepcache-off_is_bit_equal"} <= ids


def test_a_method_tells_what_it_may_and_nothing_else(found):
    row = registry.get_method("planted_scheduler")
    suite = SUITES["scheduler"]
    with pytest.raises(ValueError, match=r"`skips` of 'planted_scheduler' has \['gausian'\]"):
        suite.cases_of(row, CommonCase(skips={"gausian": "it is discrete"}))
    cases = suite.cases_of(row, CommonCase(skips={"gaussian": "it is discrete"}))
    marks = {param.id: [mark.kwargs for mark in param.marks] for param in suite.params(cases)}
    assert marks["planted_scheduler-gaussian"] == [{"reason": "planted_scheduler: it is discrete"}]
    assert marks["planted_scheduler-interface"] == []


def test_a_known_fault_must_be_one(found):
    suite = SUITES["scheduler"]
    cases = suite.cases_of(registry.get_method("planted_scheduler"), CommonCase())
    params = suite.params(cases, {("PlantedScheduler", "gaussian"): "it diverges"})
    (mark,) = next(param.marks for param in params if param.id == "planted_scheduler-gaussian")
    assert mark.name == "xfail" and mark.kwargs == {"reason": "it diverges", "strict": True}
