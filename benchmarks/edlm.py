"""What energies are worth to the few-step texts of a masked diffusion model: a small causal model, and trained energies.

    diffusers-ext bench edlm            # records diffusers_ext/results/edlm.json

Settings were fixed before measuring: the defaults of `EnergyReweightedScheduler`, 8 candidates in the first 40 % of the time.
Three small causal models of the same tokenizer are trained from nothing, and three energies from the denoiser, each for at most
three minutes of one core; that is little, and what more training would give is not measured. A text's number is the mean over
the three. The paper's claim is 1.3 times fewer steps at no loss: 10 steps with energy against 13 without. The judge is another
model than the energies; a low judge alone says little, so the entropy of the tokens stands beside it, and the seconds a text with
them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, PROMPT, Decoded, Decoder, TrigramJudge, decode, fine_tuned, means, verses
from benchmarks._trainings import training_folder
from benchmarks.data import load_kjv
from diffusers_ext.training import train_edlm
from diffusers_ext.training._text import TextWindows

SETTINGS: dict[str, Any] = {"texts": 64, "length": 64, "steps": 10, "more_steps": 13, "candidates": 8}
SEEDS = (0, 1, 2)
CAUSAL: dict[str, Any] = {"hidden": 160, "layers": 2, "heads": 5, "batch": 16, "steps": 450, "learning_rate": 3e-3}
ENERGY: dict[str, Any] = {
    "max_seq_length": 72, "train_batch_size": 12, "max_train_steps": 80, "learning_rate": 3e-4, "lr_warmup_steps": 10,
    "lr_scheduler": "constant_with_warmup", "min_mask_ratio": 0.3, "checkpointing_steps": 20,
}  # fmt: skip
BENCHMARK = Benchmark("edlm", settings={"model": MODEL, "causal": CAUSAL, "energy": ENERGY, **SETTINGS})


def causal_model(seed: int) -> LlamaForCausalLM:
    """A small causal model of chapters that the denoiser was trained on too; trains it where that was not done."""
    tokenizer = verses()[1]
    folder = training_folder("edlm", "diffusers_ext.schedulers.energy_reweighted", CAUSAL) / f"causal-{seed}"
    if not (folder / "model.safetensors").is_file():
        data = TextWindows(load_kjv("generator"), tokenizer, PROMPT + SETTINGS["length"])
        torch.manual_seed(seed)
        size = CAUSAL["hidden"]
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=size, intermediate_size=2 * size, tie_word_embeddings=True,
                num_hidden_layers=CAUSAL["layers"], num_attention_heads=CAUSAL["heads"], max_position_embeddings=128,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=CAUSAL["learning_rate"], betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CAUSAL["learning_rate"], CAUSAL["steps"])
        for _ in tqdm(range(CAUSAL["steps"]), desc=f"causal model {seed}", mininterval=5):
            ids = torch.stack([data[int(i)]["input_ids"] for i in torch.randint(len(data), (CAUSAL["batch"],))])
            ids = torch.nn.functional.pad(ids, (1, 0), value=tokenizer.bos_token_id)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@BENCHMARK.part("causal_gain", "trained_gain", "causal_over_more_steps", minutes=12)
def texts(recorder: Recorder) -> None:
    """The judge of texts with and without energy, text by text."""
    model, tokenizer = verses()
    TrigramJudge.of_the_training_data()  # not in the seconds of the first
    seconds: dict[str, float] = {}

    def run(name: str, steps: int, energy: Any = None) -> Decoded:
        begin, call = time.perf_counter(), {"num_inference_steps": steps, "step_cache": energy is None}
        scheduler: Any = dx.AbsorbingDiffusionScheduler()
        if energy is None:
            found = decode(name, Decoder(scheduler, call), SETTINGS["texts"], SETTINGS["length"])
        else:
            scheduler = dx.EnergyReweightedScheduler(num_candidates=SETTINGS["candidates"])
            handle = scheduler.guide(model, energy)
            found = decode(name, Decoder(scheduler, call), SETTINGS["texts"], SETTINGS["length"])
            handle.remove()
        seconds[name] = (time.perf_counter() - begin) / SETTINGS["texts"]
        return found

    few, more = SETTINGS["steps"], SETTINGS["more_steps"]
    made = {f"{steps} steps": run(f"{steps} steps", steps) for steps in (few, more)}
    groups: dict[str, list[Decoded]] = {"causal": [], "trained": []}
    for seed in SEEDS:
        for kind, energy in (
            ("causal", dx.ARResidualEnergy(causal_model(seed), bos_token_id=tokenizer.bos_token_id)),
            ("trained", dx.NCEEnergy.from_pretrained(fine_tuned(train_edlm.main, ENERGY, seed=seed)).eval()),
        ):
            name = f"{few} steps, {kind} energy {seed}"
            made[name] = run(name, few, energy)
            groups[kind].append(made[name])

    ours = {kind: means(one.nats for one in group) for kind, group in groups.items()}
    for name, kind, steps in (
        ("causal_gain", "causal", few), ("trained_gain", "trained", few), ("causal_over_more_steps", "causal", more),
    ):  # fmt: skip
        recorder.paired(
            name,
            f"the judge's negative log-likelihood of {few} steps with the {kind} energy less that of {steps} without, {MODEL}",
            Samples("difference", {"ours": ours[kind], "theirs": made[f"{steps} steps"].nats}, 0.02, each=False),
            "nats a token", goal=("<=", 0.0),
        )  # fmt: skip
    rows = [[name, *found.row, seconds[name]] for name, found in made.items()]
    recorder.table("texts", ["texts by", *COLUMNS, "seconds a text"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
