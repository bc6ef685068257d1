"""Saving and loading on this machine: recipes, LoRA files, classes of ours, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open

import diffusers_ext as dx
from tests import toy

STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}  # what the pipeline wants of a scheduler
LORA = "lora/{}/pytorch_lora_weights.safetensors"


@pytest.fixture
def toys(tmp_path):
    (tmp_path / "toy").mkdir()
    with toy.installed(tmp_path / "toy") as classes:
        yield classes


def draw(pipe, steps=3):
    """Latents of one picture: `(1, 4, 16, 16)`."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a woman with glasses", num_inference_steps=steps, generator=generator, output_type="latent").images


def index(folder):
    return json.loads((Path(folder) / "model_index.json").read_text())


def rewrite_index(folder, **changes):
    (Path(folder) / "model_index.json").write_text(json.dumps(index(folder) | changes))


def add_lora(model, name, seed=0, **settings):
    """A LoRA with random weights on a model."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_v", "q_proj"]} | settings
    model.add_adapter(LoraConfig(init_lora_weights=settings.pop("init_lora_weights", False), **settings), name)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_what_is_on_comes_back(pipe, tmp_path):
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    expected = draw(pipe)
    folder = dx.save_pretrained(pipe, tmp_path / "saved")
    assert folder == tmp_path / "saved"
    loaded = dx.Pipeline.from_pretrained(folder)
    assert type(loaded) is StableDiffusionPipeline
    assert [(entry.key, entry.component, entry.config) for entry in dx.status(loaded)] == [
        ("deepcache", "unet", dx.DeepCacheConfig(interval=2))
    ]
    assert torch.equal(draw(loaded), expected)
    assert index(folder)["_dx_recipe"]["methods"][0]["config"]["interval"] == 2
    stock = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(draw(stock), draw(dx.disable(pipe)))
    assert not torch.equal(draw(stock), expected)


def test_an_ordinary_pipeline_stays_ordinary(pipe, tmp_path):
    dx.disable(dx.enable(pipe, dx.DeepCacheConfig()))
    before = {**pipe.config}
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    assert before.items() <= dict(pipe.config).items()
    assert not [key for key in index(folder) if key.startswith("_dx")]
    assert {file.name for file in folder.iterdir()} == {
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    }
    texts = [file for file in folder.rglob("*.json") if file.name != "tokenizer.json"]
    assert not [file for file in texts if "_name_or_path" in file.read_text()]
    assert torch.equal(draw(dx.Pipeline.from_pretrained(folder)), draw(pipe))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("deepcache", "must be an object"),
        ({"schema": 99, "methods": []}, "update diffusers_ext"),
        (
            {"schema": 1, "methods": [{"method": "warp_drive", "config": {}}]},
            "'warp_drive', version 1, which is not installed",
        ),
        ({"schema": 1, "methods": [{"method": "deepcache", "config": {"speed": 9}}]}, r"settings \['speed'\]"),
        ({"schema": 1, "methods": [{"method": "deepcache", "config": {"interval": 0}}]}, "`interval` is 0"),
        ({"schema": 1, "methods": [], "loras": {}}, "`loras` of the recipe"),
        ({"schema": 1, "methods": [], "loras": [{"adapter_name": "a"}]}, "`adapter_name`, `weight` and `file`"),
        (
            {
                "schema": 1,
                "methods": [],
                "loras": [{"adapter_name": "a", "weight": 1.0, "file": "lora/../../x.safetensors"}],
            },
            "`file` in the recipe is 'lora/../../x.safetensors'",
        ),
        (
            {"schema": 1, "methods": [], "loras": [{"adapter_name": "a", "weight": "1", "file": LORA.format("a")}]},
            "`weight` in the recipe is '1'",
        ),
        (
            {"schema": 1, "methods": [], "loras": 2 * [{"adapter_name": "a", "weight": 1, "file": LORA.format("a")}]},
            "stands once",
        ),
    ],
)
def test_a_bad_recipe_is_refused_before_weights_are_loaded(tmp_path, recipe, message):
    shutil.copy(
        dx.zoo_path("avatars-sd") / "model_index.json", tmp_path
    )  # no weights: loading them fails in another way
    rewrite_index(tmp_path, _dx_recipe=recipe)
    with pytest.raises(ValueError, match=message):
        dx.Pipeline.from_pretrained(tmp_path)


def test_an_unknown_method_can_be_skipped(pipe, tmp_path):
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    rewrite_index(folder, _dx_recipe={"schema": 1, "methods": [{"method": "warp_drive", "version": 2, "config": {}}]})
    with pytest.raises(ValueError, match="skip_unknown"):
        dx.Pipeline.from_pretrained(folder)
    with pytest.warns(UserWarning, match="warp_drive"):
        loaded = dx.Pipeline.from_pretrained(folder, skip_unknown=True)
    assert torch.equal(draw(loaded), draw(pipe))


# --- stock arguments -------------------------------------------------------------------------------------------------


def test_stock_arguments_are_passed_on(pipe, tmp_path, caplog):
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False, variant="fp16", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.fp16-*.safetensors"))) > 1
    scheduler = DDIMScheduler(num_train_timesteps=500, **STABLE_DIFFUSION)
    loaded = dx.Pipeline.from_pretrained(
        str(folder), variant="fp16", dtype=torch.float64, scheduler=scheduler, local_files_only=True
    )
    assert loaded.unet.dtype == torch.float64
    assert loaded.scheduler is scheduler
    with pytest.raises(OSError, match="no file named"):
        dx.Pipeline.from_pretrained(folder)

    def warnings_of(load):
        caplog.clear()
        logger = logging.getLogger("diffusers")
        logger.addHandler(caplog.handler)
        try:
            load(folder, variant="fp16", flux_capacitor=1)
        finally:
            logger.removeHandler(caplog.handler)
        return [record.getMessage() for record in caplog.records if "flux_capacitor" in record.getMessage()]

    assert warnings_of(dx.Pipeline.from_pretrained) == warnings_of(DiffusionPipeline.from_pretrained) != []


def test_errors_name_the_cause(pipe, tmp_path):
    with pytest.raises(OSError, match=r"no file named model_index.json found in directory .*" + tmp_path.name):
        dx.Pipeline.from_pretrained(tmp_path)
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(
        Exception, match=r"(?s)unet.diffusion_pytorch_model|MetadataIncompleteBuffer|incomplete"
    ) as error:
        dx.Pipeline.from_pretrained(folder)
    assert "unet" in str(error.value)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(OSError, match=r"model_index.json' is not a valid JSON"):
        dx.Pipeline.from_pretrained(folder)


# --- classes of ours -------------------------------------------------------------------------------------------------


def test_classes_of_ours_come_from_the_installed_package(pipe, toys, tmp_path):
    pipe = toy.toy_pipeline(pipe, toys, hold=0.1)
    expected = draw(pipe)
    folder = dx.save_pretrained(pipe, tmp_path / "saved")
    saved = index(folder)
    assert saved["_dx_classes"] == {"scheduler": "ToyScheduler", "unet": "ToyUNet", "_class_name": "ToyPipeline"}
    (scheduler_file,) = (folder / "scheduler").glob("*.py")
    (model_file,) = (folder / "unet").glob("*.py")
    (pipeline_file,) = folder.glob("*.py")
    assert saved["scheduler"] == [scheduler_file.stem, "ToyScheduler"]
    assert saved["unet"] == [model_file.stem, "ToyUNet"]
    assert saved["_class_name"] == [pipeline_file.stem, "ToyPipeline"]
    assert scheduler_file.stem.startswith("scheduling_toy_")

    loaded = dx.Pipeline.from_pretrained(folder)
    assert type(loaded) is toys.ToyPipeline
    assert (type(loaded.scheduler), type(loaded.unet)) == (toys.ToyScheduler, toys.ToyUNet)
    assert loaded.scheduler.config.hold == 0.1
    assert loaded.say() == "toy 2"
    assert torch.equal(draw(loaded), expected)
    assert (
        type(dx.Pipeline.from_pretrained(folder, scheduler=DDIMScheduler(**STABLE_DIFFUSION)).scheduler)
        is DDIMScheduler
    )
    assert dx.save_pretrained(loaded, folder) == folder  # the same sources, the same names: nothing piles up
    assert set(folder.rglob("*.py")) == {pipeline_file, scheduler_file, model_file}

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)
    remote = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(draw(remote), expected)
    with pytest.raises(ValueError, match="was loaded with `trust_remote_code`"):
        dx.save_pretrained(remote, tmp_path / "again")


def test_only_public_classes_are_taken_from_the_package(pipe, toys, tmp_path):
    pipe.scheduler = toys.ToyScheduler()
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    stem = index(folder)["scheduler"][0]
    rewrite_index(folder, _dx_classes={"scheduler": "AnotherScheduler"})
    with pytest.raises(ValueError, match="'AnotherScheduler'"):
        dx.Pipeline.from_pretrained(folder)
    rewrite_index(folder, _dx_classes=["scheduler"])
    with pytest.raises(ValueError, match="`_dx_classes`"):
        dx.Pipeline.from_pretrained(folder)
    # Neither a class that is not public nor a function: both stay the repository's own code, which is not trusted.
    for name in ("HookConfig", "push_to_hub"):
        rewrite_index(folder, _dx_classes={"scheduler": name}, scheduler=[stem, name])
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            dx.Pipeline.from_pretrained(folder)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def loras(pipe):
    return [(name, sorted(names)) for name, names in pipe.get_list_adapters().items()]


def test_loras_are_split_out_and_come_back(pipe, tmp_path):
    base = draw(pipe)
    add_lora(pipe.unet, "style", 1)
    add_lora(pipe.text_encoder, "style", 2, use_rslora=True)
    add_lora(pipe.unet, "face 2", 3, r=4, lora_alpha=2, rank_pattern={"to_v": 2}, use_dora=True)
    add_lora(pipe.unet, "unused", 4)
    pipe.set_adapters(["face 2", "style"], [0.3, {"unet": 0.7, "text_encoder": -1.5}])
    expected, before = draw(pipe), {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    folder = dx.save_pretrained(pipe, tmp_path / "saved")
    assert index(folder)["_dx_recipe"] == {
        "schema": 1,
        "methods": [],
        "loras": [
            {"adapter_name": "face 2", "weight": 0.3, "file": LORA.format("face_2")},
            {"adapter_name": "style", "weight": {"unet": 0.7, "text_encoder": -1.5}, "file": LORA.format("style")},
            {"adapter_name": "unused", "weight": None, "file": LORA.format("unused")},
        ],
    }
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(draw(pipe), expected)

    stock = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(draw(stock), base)
    loaded = dx.Pipeline.from_pretrained(folder)
    assert loras(loaded) == loras(pipe)
    assert torch.equal(draw(loaded), expected)
    again = dx.save_pretrained(loaded, tmp_path / "again")
    assert index(again)["_dx_recipe"] == index(folder)["_dx_recipe"]

    # Each file is a standard one.
    stock.load_lora_weights(
        folder, subfolder="lora/style", weight_name="pytorch_lora_weights.safetensors", adapter_name="x"
    )
    stock.set_adapters(["x"], [{"unet": 0.7, "text_encoder": -1.5}])
    pipe.set_adapters(["style"], [{"unet": 0.7, "text_encoder": -1.5}])
    assert torch.equal(draw(stock), draw(pipe))
    with safe_open(folder / LORA.format("style"), "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 3
    assert metadata["text_encoder.use_rslora"] is True


def test_loras_that_are_off_stay_off(pipe, tmp_path):
    base = draw(pipe)
    add_lora(pipe.unet, "style")
    pipe.disable_lora()
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    loaded = dx.Pipeline.from_pretrained(folder)
    assert torch.equal(draw(loaded), base)
    pipe.enable_lora()
    loaded.enable_lora()
    assert torch.equal(draw(loaded), draw(pipe))
    assert not torch.equal(draw(pipe), base)


def test_an_adapter_that_is_active_on_one_component_only(pipe, tmp_path):
    add_lora(pipe.unet, "a", 1)
    add_lora(pipe.text_encoder, "a", 2)
    add_lora(pipe.unet, "b", 3)  # peft leaves "b" active on the U-Net, and "a" on the text encoder
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    assert [row["weight"] for row in index(folder)["_dx_recipe"]["loras"]] == [{"unet": 0.0, "text_encoder": 1.0}, 1.0]
    assert torch.equal(draw(dx.Pipeline.from_pretrained(folder)), draw(pipe))


def test_a_recipe_with_methods_and_loras(pipe, tmp_path):
    add_lora(pipe.unet, "style")
    dx.enable(pipe, dx.DeepCacheConfig(interval=2))
    expected = draw(pipe)
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    loaded = dx.Pipeline.from_pretrained(folder)
    assert torch.equal(draw(loaded), expected)
    (folder / LORA.format("style")).unlink()
    with pytest.raises(OSError, match="lora/style"):
        dx.Pipeline.from_pretrained(folder)


def test_a_model_that_peft_wraps(pipe, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    bare, pipe.unet = pipe.unet, get_peft_model(pipe.unet, config, adapter_name="mine")
    wrapped = pipe.unet
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    assert pipe.unet is wrapped
    loaded = dx.Pipeline.from_pretrained(folder)
    assert type(loaded.unet) is type(bare)
    assert loras(loaded) == [("unet", ["mine"])]
    expected, found = wrapped.get_base_model().state_dict(), loaded.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.unet.peft_config["mine"].lora_alpha == 4


def test_fused_loras(pipe, tmp_path):
    add_lora(pipe.unet, "style")
    expected = draw(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"LoRA 'style' is fused .*unfuse_lora.*unload_lora_weights"):
        dx.save_pretrained(pipe, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    pipe.unload_lora_weights()  # what the message says: the weights are plain again
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    assert "_dx_recipe" not in index(folder)
    assert torch.allclose(draw(DiffusionPipeline.from_pretrained(folder)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoHaConfig(r=2, target_modules=["to_q"]), "adapter of type LOHA"),
        (IA3Config(target_modules=["to_k"], feedforward_modules=[]), "adapter of type IA3"),
        (LoraConfig(r=2, target_modules=["to_q"], bias="all"), "bias='all'"),
        (LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"]), "modules_to_save"),
        (LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_a_lora_file_cannot_hold_are_refused(pipe, tmp_path, config, message):
    pipe.unet.add_adapter(config, "mine")
    with pytest.raises(ValueError, match=message):
        dx.save_pretrained(pipe, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_lora_where_the_pipeline_loads_none_is_refused(pipe, tmp_path):
    add_lora(pipe.vae, "mine", target_modules=["conv_out"])
    with pytest.raises(ValueError, match=r"`vae` of StableDiffusionPipeline has LoRA 'mine'.*unet, text_encoder"):
        dx.save_pretrained(pipe, tmp_path / "saved")


# --- where it is saved -----------------------------------------------------------------------------------------------


def test_compiled_parts_are_unwrapped(pipe, tmp_path):
    expected, keys = draw(pipe), set(pipe.unet.state_dict())
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    folder = dx.save_pretrained(pipe, tmp_path / "saved", card=False)
    assert type(pipe.unet.mid_block).__name__ == type(pipe.vae).__name__ == "OptimizedModule"
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert set(loaded.unet.state_dict()) == keys
    assert torch.equal(draw(loaded), expected)


def test_files_of_others_stay_and_files_of_the_old_pipeline_go(pipe, tmp_path):
    folder = tmp_path / "saved"
    (folder / "unet").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "other.safetensors").write_text("mine")
    add_lora(pipe.unet, "style")
    dx.save_pretrained(pipe, folder, max_shard_size="1MB")
    assert (folder / "README.md").exists()
    shards = list((folder / "unet").glob("diffusion_pytorch_model-*"))
    assert shards
    pipe.unload_lora_weights()
    dx.enable(pipe, dx.DeepCacheConfig(interval=4))
    dx.save_pretrained(pipe, folder)
    assert (folder / "notes.txt").read_text() == (folder / "unet" / "other.safetensors").read_text() == "mine"
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert names == {
        *("README.md", "model_index.json", "notes.txt", "scheduler/scheduler_config.json"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/other.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    assert "interval=4" in (folder / "README.md").read_text()
    assert not list(tmp_path.glob(".partial-*"))


def test_a_card_of_somebody_stays(pipe, tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    dx.save_pretrained(pipe, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_nothing_half_written_stays(pipe, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    add_lora(pipe.unet, "style")
    before = list(pipe.unet.state_dict())
    monkeypatch.setattr(pipe.unet, "save_pretrained", fail, raising=False)
    with pytest.raises(RuntimeError, match="disk full"):
        dx.save_pretrained(pipe, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    assert list(pipe.unet.state_dict()) == before


def test_what_would_be_lost_or_leaked_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="`pipe` is UNet2DConditionModel"):
        dx.save_pretrained(pipe.unet, tmp_path / "saved")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file"):
        dx.save_pretrained(pipe, tmp_path / "file")
    (tmp_path / "file").unlink()

    feature_extractor, pipe.feature_extractor = pipe.feature_extractor, object()
    with pytest.raises(ValueError, match="`feature_extractor` is object, which diffusers cannot save"):
        dx.save_pretrained(pipe, tmp_path / "saved")
    pipe.feature_extractor = feature_extractor

    config = dict(pipe.scheduler.config)
    pipe.tokenizer.init_kwargs["special_tokens_map_file"] = f"{tmp_path}/cache/map.json"  # some versions save that
    for leak in (f"{tmp_path}/cache", "/home/somebody/data", "C:\\Users\\somebody\\data"):
        pipe.scheduler.register_to_config(trained_from=leak)
        with pytest.raises(ValueError, match=r"scheduler_config.json.* a path of this machine"):
            dx.save_pretrained(pipe, tmp_path / "saved")
    pipe.scheduler.register_to_config(trained_from="https://example.org/home/somebody/data")
    dx.save_pretrained(pipe, tmp_path / "fine", card=False)
    assert str(tmp_path) not in (tmp_path / "fine" / "tokenizer" / "tokenizer_config.json").read_text()
    pipe.scheduler = DDIMScheduler.from_config(config)

    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="`unet` is offloaded"):
        dx.save_pretrained(pipe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
