"""Make `fast_forward_lora.json`: where the authors' first Fast Forward stage validates, and where it ends, on quadratic losses.

    python -m tests.golden.make_fast_forward_lora FOLDER_OF_THE_CLONE

Repository AdirRahamim/Fast-Forward, commit e217ded, `finetune` of main.py, which is run as it is. The language model, its data
and the packages that the file imports are replaced: the loss is the quadratic one of the test, the optimizer is plain gradient
descent. Per run: weights at each validation of the first stage, and weights when the next training step begins.
"""

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.methods.test_fast_forward_lora import GOLDEN_RUNS, INTERVAL, WARMUP, Quadratic


class Done(Exception):
    """The first stage is over."""


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index

    def select(self, rows):
        return Rows(len(rows))


class Datasets(dict):
    def set_format(self, _):
        pass


class Toy(Quadratic):
    """The loss as a language model gives it; notes where it was called."""

    def __init__(self, start, target):
        super().__init__(start, target)
        self.trained, self.validated = 0, []

    def forward(self, *_, **__):
        if self.training:
            if self.trained == WARMUP + INTERVAL:
                raise Done
            self.trained += 1
        else:
            self.validated.append(self.lora.tolist())
        return SimpleNamespace(loss=self.loss())


class Accelerator:
    gradient_accumulation_steps = 1

    def __init__(self, **_):
        pass

    def prepare(self, *parts):
        return parts

    def accumulate(self, _):
        import contextlib

        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def gather(self, loss):
        return loss

    def print(self, *_):
        pass


def run(source, settings):
    toy = Toy(settings["start"], settings["target"])

    def anything(*_, **__):
        return SimpleNamespace()

    def module(name, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        return made

    datasets = Datasets(train=Rows(100), test=Rows(40))
    stubs = {
        "transformers": module(
            "transformers", AutoModelForCausalLM=SimpleNamespace(from_pretrained=anything), AdamW=torch.optim.SGD,
            AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: SimpleNamespace(eos_token=None)), DataCollatorForLanguageModeling=lambda **_: collate,
        ),
        "datasets": module("datasets", load_dataset=anything, load_from_disk=anything),
        "peft": module("peft", LoraConfig=anything, get_peft_model=lambda *_: toy),
        "flops_profiler": module("flops_profiler"),
        "flops_profiler.profiler": module("flops_profiler.profiler", FlopsProfiler=anything),
        "trl": module("trl", DataCollatorForCompletionOnlyLM=anything),
        "time_recorder": module("time_recorder", TimeRecorder=Recorder),
        "utils": module(
            "utils", INSTRUCTION_KEY="", END_KEY="", RESPONSE_KEY_NL="", DEFAULT_CHAT_TEMPLATE="",
            print_trainable_parameters=anything, get_instruction_dataset=anything, get_chat_dataset=anything,
            get_medical_dataset=lambda *_: datasets,
        ),
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        scope = {"__name__": "reference", "Accelerator": Accelerator}
        exec(compile(source, "main.py", "exec"), scope)
    finally:
        for name, there in before.items():
            if there is None:
                del sys.modules[name]
            else:
                sys.modules[name] = there
    args = SimpleNamespace(
        model_name="pythia", tokenizer_max_length=1, task="medical", output_dir="nowhere", lora_rank=1, lora_alpha=1,
        use_dora=False, lr=settings["lr"], batch_size=1, eval_batch_size=32, accumulation_steps=1, fast_forward=True,
        flops_profiler=False, evaluate_every=10**9, num_stabilization_steps=WARMUP,
    )  # fmt: skip
    try:
        scope["finetune"](args)
    except Done:
        return {"validated": toy.validated, "after": toy.lora.tolist()}
    raise RuntimeError("There was no stage.")


def collate(rows):
    return dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.zeros(len(rows)))


class Recorder:
    def __getattr__(self, name):
        return lambda: None


def main(folder: Path) -> None:
    source = (folder / "main.py").read_text()
    runs = {name: run(source, settings) for name, settings in GOLDEN_RUNS.items()}
    facts = {
        "repository": "https://github.com/AdirRahamim/Fast-Forward",
        "commit": "e217dedab45fdf430e3a2ed9d47cc02aa77f8168",
        "file": "main.py",
        "how": "python -m tests.golden.make_fast_forward_lora FOLDER",
    }
    file = Path(__file__).with_name("fast_forward_lora.json")
    file.write_text(json.dumps({"source": facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
