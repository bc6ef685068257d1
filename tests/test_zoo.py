"""The zoo's checkpoints: stock classes load them, they draw what they are asked for, and their cards tell what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusers_ext as dx
from tests.fresh import run_fresh

ROOT = Path(__file__).parents[1]
ROOTS = (ROOT / "diffusers_ext" / "zoo", ROOT / "benchmarks" / "zoo")
NAMES = ("avatars-sd", "avatars-flow", "fashion-ddpm", "fashion-dit", "verses-mdlm")
LOADERS = {
    "avatars-sd": "from diffusers import StableDiffusionPipeline as P",
    "avatars-flow": "from diffusers import FluxPipeline as P",
    "fashion-ddpm": "from diffusers import DDPMPipeline as P",
    "fashion-dit": "from diffusers import DiTPipeline as P",
    "verses-mdlm": "from transformers import AutoModelForMaskedLM as P",
}


def zoo(name: str) -> Path:
    """Folder of a checkpoint; skips the test where it is not there."""
    try:
        return dx.zoo_path(name)
    except ValueError as error:
        pytest.skip(f"{error} Its script is benchmarks/zoo/make_{name.replace('-', '_')}.py.")


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_stock_classes_load_every_checkpoint_in_float32_without_this_package():
    there = {folder.parent.name for root in ROOTS for folder in root.glob("*/quality.json")}
    assert there <= set(NAMES), "each checkpoint has a line in this test"
    loads = "\n".join(
        f"""{LOADERS[name]}
pipe = P.from_pretrained({str(dx.zoo_path(name))!r})
parts = [pipe] if isinstance(pipe, torch.nn.Module) else [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
assert parts and {{p.dtype for p in parts}} == {{torch.float32}}, {name!r}"""
        for name in sorted(there)
    )
    run_fresh(f"import sys, torch\n{loads}\nassert 'diffusers_ext' not in sys.modules")


def test_the_wheel_and_the_repository_stay_small():
    assert weight_bytes(dx.zoo_path("avatars-sd")) <= 8e6
    assert sum(file.stat().st_size for file in ROOTS[1].rglob("*") if file.is_file()) <= 25e6
    weights = {file.suffix for root in ROOTS for file in root.rglob("*") if file.stat().st_size > 1e5} - {".json"}
    assert weights == {".safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_what_was_measured(name):
    """The card is what its script makes of the recorded numbers, no more and no less."""
    folder = zoo(name)
    maker = importlib.import_module(f"benchmarks.zoo.make_{name.replace('-', '_')}")
    quality = json.loads((folder / "quality.json").read_text())
    assert folder == maker.FOLDER
    assert (folder / "README.md").read_text() == maker.card(quality)


def test_the_card_of_the_lora_shows_what_was_recorded():
    from benchmarks.zoo import make_avatars_hipa as maker

    assert (maker.FOLDER / "README.md").read_text(encoding="utf-8") == maker.card(maker.recorded())


def test_avatars_flow_follows_captions_with_guidance():
    from diffusers import FluxPipeline

    from benchmarks.zoo import _avatars

    pipe = FluxPipeline.from_pretrained(dx.zoo_path("avatars-flow"))
    pipe.set_progress_bar_config(disable=True)
    captions = list(dict.fromkeys(_avatars.captions("reference")))[:24]
    pictures = pipe(
        captions, negative_prompt=[""] * 24, true_cfg_scale=3.0, height=32, width=32, max_sequence_length=32,
        num_inference_steps=10, generator=[torch.Generator().manual_seed(i) for i in range(24)], output_type="np",
    ).images  # fmt: skip
    scores = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).score(pictures, captions)
    assert scores["hat"] >= 0.85 and scores["glasses"] >= 0.85 and scores["clothes_color"] >= 0.7, scores


def test_fashion_dit_follows_classes_with_guidance():
    from diffusers import DiTPipeline

    from diffusers_ext.metrics import FashionJudge

    pipe = DiTPipeline.from_pretrained(zoo("fashion-dit"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["sneaker", "ankle boot"]) == [7, 9]
    labels = [i % 10 for i in range(40)]
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    pictures = pipe(labels, guidance_scale=2.0, num_inference_steps=10, generator=generators, output_type="np").images
    judge = FashionJudge.from_pretrained(dx.zoo_path("fashion-judge"))
    assert judge.accuracy(pictures, labels) >= 0.7
    assert judge.accuracy(pictures, labels[1:] + labels[:1]) <= 0.3, "of other classes it is wrong"


def test_fashion_ddpm_draws_every_class():
    from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

    from diffusers_ext.metrics import FashionJudge

    pipe = DDPMPipeline.from_pretrained(dx.zoo_path("fashion-ddpm"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(i) for i in range(60)]
    pictures = pipe(60, generator=generators, num_inference_steps=10, output_type="np").images
    assert pictures.shape == (60, 28, 28, 1) and np.isfinite(pictures).all()
    counts = np.bincount(FashionJudge.from_pretrained(dx.zoo_path("fashion-judge"))(pictures), minlength=10)
    assert (counts > 0).sum() >= 8, f"pictures by class: {counts}"


def test_verses_mdlm_is_driven_by_the_stock_pipeline_and_prefers_english():
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from diffusers_ext.metrics import masked_nll_bound

    folder = dx.zoo_path("verses-mdlm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    ids = tokenizer("And it came to pass", return_tensors="pt").input_ids
    output = pipe(
        input_ids=ids, gen_length=24, block_length=16, num_inference_steps=8, temperature=1.0, threshold=1.0,
        editing_threshold=None, generator=torch.Generator().manual_seed(0), eos_early_stop=False,
    )  # fmt: skip
    assert output.sequences.shape == (1, 24) and not (output.sequences == tokenizer.mask_token_id).any()
    verse = tokenizer("And God saw the light, that it was good: and God divided the light from the darkness.").input_ids
    shuffled = [verse[i] for i in torch.randperm(len(verse), generator=torch.Generator().manual_seed(0)).tolist()]
    bound = masked_nll_bound(model, torch.tensor([verse, shuffled]), tokenizer.mask_token_id, samples=8)
    assert bound.nats[0] < bound.nats[1] - len(verse), "a nat a token less than for the same words in disorder"
