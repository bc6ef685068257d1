"""The app: what it finds and does, without its page; and its page in a real browser, where there is one.

Without gradio, playwright or Chromium the page is not tested. One server and one browser serve all tests.
"""

from __future__ import annotations

import builtins
import dataclasses
import re
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext import _options, app
from diffusers_ext._studio import Comparison, Request, Studio, Way, zoo

PROMPT = "a person with tan skin and long red hair, a happy smile, navy clothes"
REQUEST = Request("avatars-sd", PROMPT, pictures=2, steps=3, guidance_scale=3.0)
CACHED = Way(2, 3.0, (dx.DeepCacheConfig(interval=2),), "EVODiffScheduler", {"use_karras_sigmas": True})


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture(scope="module")
def compared(studio):
    return studio.compare(None, REQUEST, CACHED)


@pytest.fixture
def lora(pipe, tmp_path):
    """Folder of a LoRA with random weights."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    pipe.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="style")
    )
    return str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def is_bare(studio):
    """Whether nothing is left on the pipeline."""
    _, pipe = studio._loaded
    names = {type(module).__module__.partition(".")[0] for module in pipe.unet.modules()}
    hooks = sum(len(module._forward_pre_hooks) for module in pipe.unet.modules())
    is_own = type(pipe.scheduler).__name__ == "DDIMScheduler"
    return is_own and not dx.status(pipe) and "peft" not in names and not hooks


# --- methods and settings --------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_dataclass():
    option = _options.configs()["DeepCacheConfig"]
    fields = {field.name: field.default for field in dataclasses.fields(dx.DeepCacheConfig)}
    assert {setting.name: setting.default for setting in option.settings} == fields
    assert [setting.kind for setting in option.settings] == ["int", "int", "str", "literal", "float"]
    assert option.settings[0].help.startswith("N, full steps are 0, N, 2N")
    assert option.read({"interval": 5.0, "branch": 0, "schedule": "", "center": "None"}) == {"interval": 5}
    assert option.read({"interval": 2.5, "center": "12"}) == {"interval": 2.5, "center": 12}


def test_what_a_form_shows_is_read_as_the_default():
    for option in [*_options.configs().values(), *_options.samplers().values()]:
        shown = {setting.name: setting.shown for setting in option.settings}
        if not any(setting.default is _options.REQUIRED for setting in option.settings):
            assert option.read(shown) == {}, option.name


def test_a_setting_without_a_default_is_asked_for():
    with pytest.raises(ValueError, match="`refiner` is empty"):
        _options.configs()["FlowTurboConfig"].read({"refiner": ""})


def test_samplers_are_asked_for_what_is_their_own():
    settings = {setting.name for setting in _options.samplers()["EVODiffScheduler"].settings}
    assert "use_karras_sigmas" in settings and not settings & {"beta_start", "prediction_type", "use_flow_sigmas"}
    assert {"UnifiedSolverScheduler", "DPMSolverMultistepScheduler"} <= set(_options.samplers())
    assert "FirstHittingScheduler" not in _options.samplers()  # of language


def test_a_pipeline_says_what_goes_on_it(studio):
    model = studio.load("avatars-sd")
    assert (model.takes, model.defaults["guidance_scale"]) == ("prompt", 3.0)
    assert model.configs["DeepCacheConfig"] is None and model.samplers["EVODiffScheduler"] is None
    assert "transformer blocks" in model.configs["DeltaDiTConfig"]
    assert "made by its own functions" in model.configs["CalibratedDPMConfig"]
    assert "`statistics` is None" in model.samplers["DPMSolverV3Scheduler"]
    assert "process" in model.samplers["FlowMatchPseudoCorrectorScheduler"]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_runs_are_compared(studio, compared):
    plain, cached = compared.runs
    assert [run.way.name for run in compared.runs] == [
        "plain, 3 steps, guidance 3",
        "EVODiff(use_karras_sigmas=True) + DeepCache(interval=2), 2 steps, guidance 3",
    ]
    assert (plain.calls, plain.psnr, cached.calls) == (3, None, 2)
    assert 5 < cached.psnr < 60 and cached.seconds > 0
    assert is_bare(studio)


@pytest.mark.parametrize("number", [0, 1])
def test_code_makes_the_same_pictures(compared, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compared.runs[number].code, names)
    assert same(names["images"], compared.runs[number].pictures)
    assert len(list(tmp_path.glob("picture-*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["avatars-flow", "fashion-dit", "fashion-ddpm"])
def test_code_of_other_pipelines(model, tmp_path, monkeypatch):
    if model not in zoo():
        pytest.skip(f"{model} lies in a source checkout")
    studio = Studio()
    found = studio.load(model)
    config = next(iter(name for name, reason in found.configs.items() if reason is None))
    sampler = "FlowMatchPseudoCorrectorScheduler" if model == "avatars-flow" else "UnifiedSolverScheduler"
    request = Request(model, **{**found.defaults, "steps": 2})
    way = Way(4, request.guidance_scale, (_options.configs()[config].cls(),), sampler)
    run = studio.compare(None, request, way).runs[-1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(run.code, names)
    assert same(names["images"], run.pictures)


def test_a_comparison_goes_on_until_the_request_changes(studio, compared, monkeypatch):
    more = studio.compare(compared, REQUEST, Way(2, 3.0))
    assert [run.way for run in more.runs] == [Way(3, 3.0), CACHED, Way(2, 3.0)]
    assert more.runs[0] is compared.runs[0]
    again = studio.compare(more, REQUEST, CACHED)
    assert [run.way for run in again.runs] == [Way(3, 3.0), Way(2, 3.0), CACHED]
    assert same(again.runs[-1].pictures, compared.runs[-1].pictures)
    assert studio.compare(again, REQUEST, Way(3, 3.0)) is again
    other = dataclasses.replace(REQUEST, seed=1, pictures=1)
    assert [run.way for run in studio.compare(again, other, Way(3, 3.0)).runs] == [Way(3, 3.0)]


def test_loras_go_on_and_off(studio, lora, compared, tmp_path, monkeypatch):
    run = studio.compare(compared, REQUEST, Way(3, 3.0, adapter=lora, strength=2.0)).runs[-1]
    assert run.psnr < 60 and f'load_lora_weights("{Path(lora).parent}", weight_name="' in run.code
    assert is_bare(studio)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(run.code, names)
    assert same(names["images"], run.pictures)


def test_adapters_of_ours_go_on_and_off(studio, pipe, compared, tmp_path):
    new = dx.AGDAdapter(
        **dx.AGDAdapter.config_for(pipe.unet, hidden_dim=8, mlp_ratio=1.0)
    )  # untrained: changes nothing
    new.save_pretrained(tmp_path / "adapter")
    way = Way(3, 3.0, adapter=str(tmp_path / "adapter"), strength=3.0)
    run = studio.compare(compared, REQUEST, way).runs[-1]
    assert run.psnr == float("inf") and "attach(pipe, guidance_scale=3.0)" in run.code
    with pytest.raises(ValueError, match="holds no AGDAdapter"):
        studio.export(REQUEST, way)
    assert is_bare(studio)


def test_what_cannot_be_is_refused_and_leaves_nothing(studio):
    both = Way(2, 3.0, (dx.DeepCacheConfig(), dx.AdaptiveDiffusionConfig()))
    with pytest.raises(ValueError, match="cannot be on together"):
        studio.compare(None, REQUEST, both)
    with pytest.raises(ValueError, match="`dc_ratios` are for"):  # in the run, when the number of steps is known
        studio.compare(None, REQUEST, Way(4, 3.0, (), "DCSolverMultistepScheduler", {"dc_ratios": [1, 1, 1.1]}))
    assert is_bare(studio)
    for name, value in {"steps": 0, "pictures": 2.5, "seed": -1, "height": 3, "guidance_scale": float("nan")}.items():
        with pytest.raises(ValueError, match=f"`{name}` is"):
            dataclasses.replace(REQUEST, **{name: value})
    with pytest.raises(ValueError, match="`sampler` is 'Euler'"):
        Way(sampler="Euler")


def test_a_broken_run_leaves_nothing(studio, compared):
    def stop(share, what):
        if share > 0.4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        studio.compare(None, dataclasses.replace(REQUEST, seed=7), CACHED, stop)
    assert is_bare(studio)
    assert same(studio.compare(None, REQUEST, Way(3, 3.0)).runs[0].pictures, compared.runs[0].pictures)


def test_strangers_get_no_folders(tmp_path):
    public = Studio(folders=False, own=str(tmp_path))
    for place in (str(tmp_path / "other"), "./x", "~/x", "tests"):
        with pytest.raises(ValueError, match="no folders"):
            public.load(place)
    with pytest.raises(ValueError, match="`model` is empty"):
        public.load("")
    with pytest.raises(OSError):  # allowed, and nothing is in it
        public.load(str(tmp_path))
    assert public._checked("someone/some-model", "model")


def test_two_requests_wait_for_each_other(studio, compared):
    found: list[Comparison] = []
    ways = [CACHED, Way(3, 3.0)]
    threads = [
        threading.Thread(target=lambda way=way: found.append(studio.compare(None, REQUEST, way))) for way in ways
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(comparison.runs) for comparison in found) == [1, 2]
    for comparison in found:
        assert same(comparison.runs[0].pictures, compared.runs[0].pictures)
        assert len(comparison.runs) == 1 or same(comparison.runs[1].pictures, compared.runs[1].pictures)


def test_the_export_is_a_repository(studio, compared, tmp_path):
    first = studio.export(REQUEST, Way(2, 3.0))
    path = studio.export(REQUEST, CACHED)
    assert path.name == "avatars-sd-deepcache.zip" and not first.exists()
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path)
    pipe = dx.Pipeline.from_pretrained(tmp_path / "avatars-sd-deepcache", dtype=torch.float32)
    assert [entry.config for entry in dx.status(pipe)] == list(CACHED.configs)
    generators = [torch.Generator().manual_seed(seed) for seed in REQUEST.seeds]
    pictures = pipe([PROMPT] * 2, num_inference_steps=2, guidance_scale=3.0, generator=generators).images
    assert same(pictures, compared.runs[-1].pictures)


def test_a_missing_gradio_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs gradio .*diffusers_ext\[app\]"):
        app.serve()


# --- the page --------------------------------------------------------------------------------------------------------

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 180_000  # milliseconds for one answer of the page, on a machine with much else to do


@pytest.fixture(scope="module")
def url(studio):
    pytest.importorskip("gradio")
    page = app.build(studio, "avatars-sd")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.launch_options())
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(url):
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url, tmp_path):
    """Open the page as another user; a picture of each is left in `tmp_path`."""
    contexts = []

    def visit(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        elsewhere = []
        page.on(
            "request",
            lambda request: (
                elsewhere.append(request.url) if not request.url.startswith((url, "data:", "blob:")) else None
            ),
        )
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector("#generate")
        assert not elsewhere  # no fonts or scripts of others
        for label in ("Steps", "Steps of the plain run"):
            page.get_by_label(label, exact=True).fill("2")
        return page

    yield visit
    for number, context in enumerate(contexts):
        context.pages[0].screenshot(path=tmp_path / f"{number}.png", full_page=True)
        context.close()


def generated(page, expected):
    """The rows of the table once it names `expected`, after a click on Generate."""
    page.click("#generate")
    page.wait_for_selector(f"#numbers tr:last-child td:has-text('{expected}')")
    return [row.inner_text().split("\t") for row in page.query_selector_all("#numbers tbody tr")]


def refused(page):
    """What is said to a click on Generate."""
    page.click("#generate")
    return said(page)


def said(page):
    text = page.get_by_test_id("toast-body").inner_text()
    page.get_by_test_id("toast-close").click()
    return text


def choose(page, field, name):
    page.locator(f"{field} input").fill(name)
    page.locator(f"{field} input").press("Enter")


def test_generate_compare_and_switch(visit):
    page = visit()
    page.get_by_label("DeepCache", exact=True).check()
    page.get_by_label("interval", exact=True).fill("2")
    rows = generated(page, "DeepCache(interval=2)")
    assert page.locator("#pictures img").count() == 2
    assert [row[0] for row in rows] == ["plain, 2 steps, guidance 3", "DeepCache(interval=2), 2 steps, guidance 3"]
    assert re.fullmatch(r"\d+\.\d\d s", rows[1][1]) and rows[1][2] == "2" and rows[1][3].endswith(" dB")
    assert "dx.enable(pipe, dx.DeepCacheConfig(interval=2))" in page.inner_text("#code")

    page.get_by_label("DeepCache", exact=True).uncheck()
    choose(page, "#sampler", "EVODiffScheduler")
    rows = generated(page, "EVODiff")
    assert [row[0].partition(",")[0] for row in rows] == ["plain", "DeepCache(interval=2)", "EVODiff"]
    code = page.inner_text("#code")
    assert "dx.EVODiffScheduler.from_config(pipe.scheduler.config)" in code and "enable" not in code

    choose(page, "#shown", "plain, 2 steps")
    page.wait_for_function("!document.querySelector('#code').innerText.includes('EVODiff')")


def test_bad_input_is_said(visit):
    page = visit()
    page.get_by_label("Steps", exact=True).fill("0")
    assert "`steps` is 0; allowed are whole numbers from 1 to 1000." in refused(page)
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("DeepCache", exact=True).check()
    page.get_by_label("interval", exact=True).fill("2.5")
    assert "`interval` is 2.5; it must be an integer of at least 1." in refused(page)
    page.get_by_label("interval", exact=True).fill("2")
    page.get_by_label("Faster Diffusion", exact=True).check()
    assert "'faster_diffusion' cannot be on together with 'deepcache'" in refused(page)
    page.get_by_label("Faster Diffusion", exact=True).uncheck()
    page.get_by_label("LoRA or adapter").fill("nobody/nothing/style.safetensors")
    assert "nobody/nothing" in refused(page)
    page.get_by_label("LoRA or adapter").fill("")
    assert len(generated(page, "DeepCache(interval=2)")) == 2
    choose(page, "#model", "nobody/nothing")
    assert "nobody/nothing" in said(page)


def test_two_users_at_once(visit):
    users = [visit(), visit()]
    for seed, page in enumerate(users):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        if seed == 0:
            page.get_by_label("DeepCache", exact=True).check()
        page.click("#generate")
    for seed, page in enumerate(users):
        page.wait_for_selector("#numbers table")
        assert f"range({seed}, {seed + 1})" in page.inner_text("#code")
        assert page.locator("#numbers tbody tr").count() == 2 - seed


def test_a_phone(visit, tmp_path):
    page = visit(390, 844)
    if "fashion-dit" in zoo():
        choose(page, "#model", "fashion-dit")
        page.wait_for_selector("#class input")
        assert not page.locator("#prompt textarea").is_visible()
        for label in ("Steps", "Steps of the plain run"):
            page.get_by_label(label, exact=True).fill("2")
    assert len(generated(page, "2 steps")) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#export")
    with page.expect_download() as waiting:
        page.locator("#file a[download]").first.click()
    with zipfile.ZipFile(waiting.value.path()) as file:
        assert any(name.endswith("/model_index.json") for name in file.namelist())
