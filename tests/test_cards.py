"""Cards: rendered from the registry, the written parts and the recorded results."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import diffusers_ext as dx
from diffusers_ext import cards, proofs, registry
from diffusers_ext.registry import get_method

WRITTEN = sorted(file.stem for file in cards.TEMPLATES.glob("*.md") if not file.stem.startswith("_"))
SECTIONS = ["What it does", "When to use it", "When not to use it", "How to call it"]
LORA = "lora/{}/pytorch_lora_weights.safetensors"
RECIPE = {
    "schema": 1,
    "methods": [
        {"method": "deepcache", "version": 1, "component": "unet", "config": {"interval": 3, "schedule": "uniform"}}
    ],
    "loras": [
        {"adapter_name": "style", "weight": {"unet": 0.5, "text_encoder": 1.0}, "file": LORA.format("style")},
        {"adapter_name": "off", "weight": None, "file": LORA.format("off")},
    ],
}


@pytest.fixture
def no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "RESULTS", tmp_path / "results")


@pytest.fixture
def recorded(no_results):
    """A result of `deepcache`, with one claim that holds and one that does not."""
    row = get_method("deepcache")
    proofs.write_result(
        row.key,
        method_version=row.version,
        source_hash=proofs.source_hash(row.module),
        machine={},
        versions={},
        settings={"model": "avatars-sd", "steps": 20},
        seeds={},
        claims=[
            proofs.claim("time", "Takes less time", 0.4567891, "x", interval=(0.4, 0.5), goal=("<=", 0.6)),
            proofs.claim("macs", "Computes | less", 0.9, "", goal=("<=", 0.5)),
        ],
        tables={"by interval": {"columns": ["N", "same"], "rows": [[3, True]]}},
    )


@pytest.fixture
def folder(tmp_path):
    def make(**index):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
        return tmp_path

    return make


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("key", WRITTEN)
def test_written_parts_are_whole(key):
    get_method(key)
    part = cards.written_part(key)
    assert [line.removeprefix("## ") for line in part.splitlines() if line.startswith("## ")] == SECTIONS
    compile(cards.snippet(key), f"{key}.md", "exec")


@pytest.mark.parametrize("key", WRITTEN)
def test_method_cards_render(key):
    card = cards.method_card(key)
    assert f"# {get_method(key).title}" in card
    assert "${" not in card
    assert ModelCard(card).data.library_name == "diffusers"


def test_a_method_card_tells_what_was_measured(recorded):
    card = cards.method_card("deepcache")
    assert "| Takes less time | 0.4568 x | 0.4 to 0.5 | <= 0.6 | yes |" in card
    assert "| Computes \\| less | 0.9 |  | <= 0.5 | no |" in card
    assert "**by interval**\n\n| N | same |\n| --- | --- |\n| 3 | yes |" in card
    assert "Measured on `avatars-sd`" in card
    assert "changed since" not in card
    assert "!!python" not in card
    data = ModelCard(card).data
    assert data.model_name == "deepcache"
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("time", 0.4567891),
        ("macs", 0.9),
    ]
    assert "https://arxiv.org/abs/2312.00858" in card


def test_a_method_card_shows_what_its_record_has_numbers_for(recorded, tmp_path):
    result = proofs.read_result("deepcache")
    columns = ["run", "GMACs a picture", "PSNR to the full run (dB)"]
    rows = [["full", 4.0, "inf"], ["DeepCache, N = 2", 2.5, 30.0], ["10 steps", 2.0, 20.0]]
    parts = ("method_version", "source_hash", "machine", "versions", "settings", "seeds", "claims")
    against = {"columns": ["run", "against"], "rows": [["DeepCache, N = 2", "10 steps"]]}
    tables = {"quality": {"columns": columns, "rows": rows}, "at equal cost": against}
    proofs.write_result("deepcache", tables=tables, **{part: result[part] for part in parts})
    folder = cards.save_method_card("deepcache", tmp_path / "card")
    card = (folder / "README.md").read_text()
    assert "![DeepCache: PSNR to the full run against cost](deepcache-macs.png)" in card
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "deepcache-macs.png"]
    with Image.open(folder / "deepcache-macs.png") as picture:
        assert picture.width > picture.height > 200


def test_a_record_without_such_numbers_has_no_plot(recorded):
    assert "![" not in cards.method_card("deepcache")


def test_a_card_says_that_the_code_has_changed_since(recorded, monkeypatch):
    assert get_method("deepcache").status == "open"  # no proofs recorded
    monkeypatch.setattr(proofs, "source_hash", lambda module: "0" * 64)
    assert "The code has changed since." in cards.method_card("deepcache")


def test_a_method_card_without_a_result_has_no_section_for_it(no_results):
    card = cards.method_card("deepcache")
    assert "What was measured" not in card
    assert "eval_results" not in metadata(card)


def test_a_method_without_a_written_part_has_no_card():
    key = next(row.key for row in registry.methods() if not (cards.TEMPLATES / f"{row.key}.md").is_file())
    with pytest.raises(ValueError, match=rf"hub_cards/{key}.md is not there"):
        cards.method_card(key)
    with pytest.raises(ValueError, match=r"no method 'deepcash'.*'deepcache'"):
        cards.method_card("deepcash")


def test_a_pipeline_card_tells_all(recorded, folder):
    source = folder(_dx_recipe=RECIPE, _dx_classes={"scheduler": "ToyScheduler"})
    card = cards.pipeline_card(source, "me/mine")
    assert cards.MARKER in card
    assert "# mine" in card
    assert "A `StableDiffusionPipeline` for [diffusers]" in card
    assert "with DeepCache, LoRA `style`, LoRA `off`." in card
    assert "| `deepcache` | `unet` | interval=3, schedule='uniform' |" in card
    assert "| `style` | unet 0.5, text_encoder 1 |" in card
    assert "| `off` | not active |" in card
    assert 'dx.Pipeline.from_pretrained("me/mine")' in card
    assert 'DiffusionPipeline.from_pretrained("me/mine", trust_remote_code=True)' in card
    assert "The code of `ToyScheduler` is in this repository" in card
    assert "leaves out `deepcache`" in card
    assert 'pipe.load_lora_weights("me/mine", subfolder="lora/style"' in card
    assert "pipe.set_adapters(['style'], [{'unet': 0.5, 'text_encoder': 1.0}])" in card
    assert "| Takes less time |" in card
    assert "Few-step models" in card  # from "When not to use it"
    assert "https://arxiv.org/abs/2312.00858" in card
    assert metadata(card) == {"library_name": "diffusers", "tags": ["diffusers_ext", "deepcache", "lora"]}


def test_the_card_of_an_ordinary_pipeline_is_short(folder):
    card = cards.pipeline_card(folder())
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## How to load it"]
    assert 'from_pretrained("path/to/this/folder")' in card
    assert "dx.Pipeline" not in card


def test_a_recipe_with_a_method_that_is_not_installed_has_a_card(folder):
    recipe = {"schema": 1, "methods": [{"method": "warp_drive", "version": 1, "config": {}}]}
    assert "| `warp_drive` | the pipeline |" in cards.pipeline_card(folder(_dx_recipe=recipe))


def test_base_model_and_licence(folder, tmp_path):
    assert cards._origin_metadata("me/base")["base_model"] == "me/base"
    for path in (None, "/somewhere/else", "./x", "a/b/c"):
        assert cards._origin_metadata(path) == {}
    source = folder()
    (tmp_path / "README.md").write_text("---\nlicense: openrail\nbase_model: me/base\n---\n")
    data = metadata(cards.pipeline_card(source))
    assert (data["license"], data["base_model"]) == ("openrail", "me/base")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index.json"):
        cards.pipeline_card(tmp_path)


def test_a_pipeline_in_memory_has_the_card_that_is_saved_with_it(pipe, tmp_path):
    dx.enable(pipe, dx.DeepCacheConfig(interval=5))
    dx.save_pretrained(pipe, tmp_path)
    card = cards.pipeline_card(pipe)
    assert card == (tmp_path / "README.md").read_text()
    assert "interval=5" in card
    with pytest.raises(ValueError, match="`pipe` is UNet2DConditionModel"):
        cards.pipeline_card(pipe.unet)
