r"""Decoding by a masked language model as a policy: its runs, what they are worth, and the clipped gradient of their steps.

A run begins with a prompt and an answer of masks. Step i sees the answer :math:`x^{(i)}` and draws tokens for its masks, of which
the scheduler keeps some. What is trained is the probability of drawn tokens in the very states that the decoder saw, and not in
states that were masked afterwards.

In a round, each prompt of a batch gets `--num_generations` runs by the weights of the moment, and `--num_iterations` optimizer
steps follow. Each takes the same states of every run, one a micro-batch, so that memory is that of one call of the model.
Completions of one prompt are together in one process.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ..schedulers._unmasking import UnmaskingScheduler
from . import _digit_orders
from ._card import training_card
from ._data import SampleNoise, generator_for
from ._loop import Callback, Task, add_run_arguments, check_common_arguments
from ._text import load_documents

_DRAWN = 0x52756E73  # seed of its own for the runs
Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]


# --- runs ------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Prompts and places for their answers.

    Attributes:
        tokens: `(rows, width)`: prompt, masks, filler.
        attention_mask: `(rows, width)`, 0 for the filler.
        columns: `(rows, length)` of the answer's tokens.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], longest: int, length: int, mask: int, filler: int) -> Layout:
        """Rows of `longest + length` tokens, so that batches of different prompts are of one shape."""
        tokens = torch.full((len(prompts), longest + length), filler)
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        columns = sizes[:, None] + torch.arange(length)
        seen = torch.arange(longest + length) < sizes[:, None] + length
        return cls(tokens.scatter(1, columns, mask), seen.long(), columns)

    def logits(self, model: Any, answers: torch.Tensor) -> torch.Tensor:
        """What the model says about `answers` `(rows, length)`: `(rows, length, vocabulary)`."""
        tokens = self.tokens.scatter(1, self.columns, answers)
        logits = model(input_ids=tokens, attention_mask=self.attention_mask).logits
        return logits.gather(1, self.columns[..., None].expand(-1, -1, logits.shape[-1]))


class Runs(NamedTuple):
    """Runs of S steps.

    Attributes:
        states: `(rows, S, length)`, the answer before each step.
        predictions: `(rows, S, length)`, the answer with all its masks drawn.
        committed: `(rows, S, length)` bool, masks that became tokens in this step.
        final: `(rows, length)`.
    """

    states: torch.Tensor
    predictions: torch.Tensor
    committed: torch.Tensor
    final: torch.Tensor


@torch.no_grad()
def run_policy(
    model: Any,
    scheduler: UnmaskingScheduler,
    layout: Layout,
    num_steps: int,
    temperature: float,
    mask_token_id: int,
    generators: list[torch.Generator],
) -> Runs:
    """Decode answers in one block, as `MaskedDiffusionPipeline` does with the same generators, one a row."""
    answers = torch.full_like(layout.columns, mask_token_id)
    scheduler.set_timesteps(num_steps, answers.device, answers.shape[1])
    steps = []
    for step in range(num_steps):
        found: Any = scheduler.step(
            layout.logits(model, answers), step, answers, mask_token_id=mask_token_id, temperature=temperature,
            generator=generators,
        )  # fmt: skip
        predicted = torch.where(answers == mask_token_id, found.sampled_tokens, answers)
        steps.append((answers, predicted, found.transfer_index))
        answers = found.prev_sample
    states, predictions, committed = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    return Runs(states, predictions, committed, answers)


def token_log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, mask_token_id: int
) -> torch.Tensor:
    """Log-probability `(rows, length)` of drawing `tokens`, of `logits` `(rows, length, vocabulary)`; the mask is never drawn."""
    mask = torch.tensor([mask_token_id], device=logits.device)
    logits = logits.float().index_fill(-1, mask, -math.inf) / temperature
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def clipped_objective(log_prob: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    r""":math:`\min(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A)`, :math:`r = p / p_{old}` (Schulman et al. 2017, eq. 7).

    Args:
        log_prob, old: `(rows, length)`, log-probabilities now and when the runs were made.
        advantage: `(rows,)`.
        clip: epsilon.
    """
    ratio = (log_prob - old).exp()
    advantage = advantage[:, None]
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def mean_where(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of the mean of a row's `values` `(rows, length)` where `where` is true; 0 for a row without."""
    count = where.sum(1)
    return (values.masked_fill(~where, 0.0).sum(1) / count.clamp(min=1)).mean()


def completion_texts(tokenizer: Any, answers: torch.Tensor) -> list[str]:
    """What answers `(rows, length)` say, up to their first end-of-text token."""
    end = tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in answers.tolist()]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


# --- prompts and rewards ---------------------------------------------------------------------------------------------


class Problems(Dataset):
    """Prompts with their answers, as texts.

    Items are `{"prompt": str, "answer": str, "index", "sample_id"}`.
    """

    def __init__(self, prompts: Sequence[str], answers: Sequence[str]) -> None:
        if not prompts:
            raise ValueError("The training data holds no prompt.")
        self.prompts, self.answers = list(prompts), list(answers)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item if isinstance(item, tuple) else (item, item)
        return {
            "prompt": self.prompts[index],
            "answer": self.answers[index],
            "index": index,
            "sample_id": sample_id,
        }


def load_problems(args: argparse.Namespace) -> Problems:
    """The problems that `--train_data_dir`, a .jsonl file, or `--dataset_name` names.

    Raises:
        ValueError: there is nothing there, or it lacks a column.
    """
    if args.train_data_dir is not None and Path(args.train_data_dir).suffix != ".jsonl":
        raise ValueError(f"`--train_data_dir` is {args.train_data_dir!r}, which is no .jsonl file.")
    columns = (args.prompt_column, args.answer_column)
    prompts, answers = (load_documents(argparse.Namespace(**{**vars(args), "text_column": name})) for name in columns)
    return Problems(prompts, answers)


def exact_match(completions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """1 where a completion is the answer, white space at both ends aside, else 0."""
    return [float(one.strip() == answer.strip()) for one, answer in zip(completions, answers, strict=True)]


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "digit_orders": _digit_orders.reward}


def reward_function(name: str) -> Reward:
    """One of `REWARDS`, or that of `package.module:function`.

    Raises:
        ValueError: there is none of this name.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`--reward` is {name!r}; allowed are {', '.join(map(repr, REWARDS))}, or package.module:function."
        ) from error


# --- the task --------------------------------------------------------------------------------------------------------


class Round(Callback):
    """What a round is trained on, kept in checkpoints.

    Attributes:
        tensors: by name, `(completions of this process, ...)`: the fields of a `Layout`; `states`, `predictions` and `where`
            `(..., K, length)` of the K states that are trained; `advantage` `(..., K)`; `old` and, with a penalty,
            `reference`, log-probabilities `(..., K, length)`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.accelerator: Accelerator

    def state_dict(self) -> dict[str, Any]:
        return {name: self.accelerator.gather(value) for name, value in self.tensors.items()}  # called in every process

    def load_state_dict(self, state: dict[str, Any]) -> None:
        number, of = self.accelerator.process_index, self.accelerator.num_processes
        device = self.accelerator.device
        self.tensors = {name: value.chunk(of)[number].to(device) for name, value in state.items()}


class UnmaskingPolicyTask(Task):
    """Rounds of runs. A method says what it decodes with, what runs are worth, and what the loss of a state is.

    Attributes:
        script: name of the module that trains it, for the card.
    """

    script: str
    on_device = ()

    def __init__(self, args: argparse.Namespace) -> None:
        name = args.pretrained_model_name_or_path
        self.args, self.reward = args, reward_function(args.reward)
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=args.revision)
        for token in ("mask_token", "eos_token"):
            if getattr(self.tokenizer, f"{token}_id") is None:
                raise ValueError(f"`--pretrained_model_name_or_path` is {name!r}, whose tokenizer has no `{token}`.")
        self.mask, self.eos = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        self.model = AutoModelForMaskedLM.from_pretrained(name, revision=args.revision, dtype=torch.float32)
        self.trained = {"model": self.model}
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False) if args.beta > 0 else None
        self.scheduler = self.decoder()
        self.round = Round()
        self.callbacks = (self.round,)

    # --- what a method is about --------------------------------------------------------------------------------------

    def decoder(self) -> UnmaskingScheduler:
        """The scheduler of the runs."""
        raise NotImplementedError

    def worth(self, runs: Runs, score: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which K steps of each run are trained, `(rows, K)`, and their advantages, `(rows, K)`.

        Args:
            runs: of P prompts with G completions each, one prompt's after the other's.
            score: rewards `(rows,)` of answers `(rows, length)`.
        """
        raise NotImplementedError

    def where(self, runs: Runs) -> torch.Tensor:
        """Whose tokens' probability is trained: `(rows, S, length)` bool."""
        raise NotImplementedError

    def step_loss(
        self,
        log_prob: torch.Tensor,
        old: torch.Tensor,
        advantage: torch.Tensor,
        where: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of one state of each run; arguments are `(rows, length)`, and `advantage` is `(rows,)`."""
        raise NotImplementedError

    # --- rounds ------------------------------------------------------------------------------------------------------

    def dataset(self, args: argparse.Namespace) -> Problems:
        problems = load_problems(args)
        longest = max(len(ids) for ids in self.tokenizer(problems.prompts, add_special_tokens=False).input_ids)
        if longest > args.max_prompt_length:
            raise ValueError(
                f"`--max_prompt_length` is {args.max_prompt_length}; the longest prompt has {longest} tokens."
            )
        return problems

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        self.problems, self.accelerator = dataset, accelerator
        self.round.accelerator = accelerator
        self.model.to(accelerator.device)
        if self.reference is not None:
            self.reference.to(accelerator.device)

    def layout(self, prompts: Sequence[str]) -> Layout:
        """Prompts as they are given to the model; the tokenizer adds nothing."""
        ids = self.tokenizer(list(prompts), add_special_tokens=False).input_ids
        made = Layout.of(ids, self.args.max_prompt_length, self.args.max_completion_length, self.mask, self.eos)
        return Layout(*(part.to(self.accelerator.device) for part in made))

    def texts(self, answers: torch.Tensor) -> list[str]:
        """What answers `(rows, length)` say, up to their end."""
        return completion_texts(self.tokenizer, answers)

    def runs(self, layout: Layout, generators: list[torch.Generator]) -> Runs:
        return run_policy(
            self.model, self.scheduler, layout, self.args.num_inference_steps, self.args.temperature, self.mask, generators
        )  # fmt: skip

    def log_prob(self, model: Any, layout: Layout, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(rows, length)` of `tokens` in `states`."""
        return token_log_probabilities(layout.logits(model, states), tokens, self.args.temperature, self.mask)

    @torch.no_grad()
    def begin(self, batch: dict[str, Any]) -> None:
        """Make the runs of a round, and all that its optimizer steps need of them."""
        group, seed = self.args.num_generations, _DRAWN ^ self.args.seed
        prompts, answers = ([text for text in batch[name] for _ in range(group)] for name in ("prompt", "answer"))
        layout = self.layout(prompts)
        numbers = (sample * group + each for sample in batch["sample_id"].tolist() for each in range(group))
        runs = self.runs(layout, [generator_for(seed, number) for number in numbers])

        def score(tokens: torch.Tensor) -> torch.Tensor:
            rewards = self.reward(self.texts(tokens), answers, prompts)
            return torch.tensor(rewards, dtype=torch.float32, device=tokens.device)

        steps, advantage = self.worth(runs, score)
        rows = torch.arange(len(prompts), device=steps.device)[:, None]
        kept = {"states": runs.states, "predictions": runs.predictions, "where": self.where(runs)}
        self.round.tensors = {
            **layout._asdict(), **{name: value[rows, steps] for name, value in kept.items()}, "advantage": advantage
        }  # fmt: skip
        for name, model in (("old", self.model), ("reference", self.reference)):
            if model is not None:
                self.round.tensors[name] = torch.stack(
                    [self.log_prob(model, layout, *self.at(k)) for k in range(steps.shape[1])], 1
                )

    def at(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """State k of each run, and the tokens that were drawn in it."""
        return self.round.tensors["states"][:, k], self.round.tensors["predictions"][:, k]

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        self.model.eval()  # dropout would be another policy than that of the runs
        args, whole = self.args, len(batch["sample_id"]) * self.accelerator.num_processes
        number = int(batch["sample_id"][0]) // whole
        if number % (args.num_iterations * args.gradient_accumulation_steps) == 0:
            self.begin(batch)
        k, found = number % args.gradient_accumulation_steps, self.round.tensors
        layout = Layout(*(found[name] for name in Layout._fields))
        reference = found["reference"][:, k] if "reference" in found else None
        log_prob = self.log_prob(self.model, layout, *self.at(k))
        return self.step_loss(log_prob, found["old"][:, k], found["advantage"][:, k], found["where"][:, k], reference)

    # --- results -----------------------------------------------------------------------------------------------------

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        """Texts for the first problems, and their mean reward."""
        count = min(self.args.num_validation_prompts, len(self.problems))
        prompts, answers = self.problems.prompts[:count], self.problems.answers[:count]
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        texts = self.texts(self.runs(self.layout(prompts), generators).final)
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True))
        (folder / f"step-{step:06d}.txt").write_text(lines, encoding="utf-8")
        return {"validation_reward": sum(self.reward(texts, answers, prompts)) / count}

    def save(self, folder: Path) -> None:
        self.model.eval()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.scheduler.save_pretrained(folder / "scheduler")

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        tags = ["masked-diffusion", "reinforcement-learning"]
        return training_card(args, self.script, "AutoModelForMaskedLM", summary, tags, "transformers")


# --- arguments -------------------------------------------------------------------------------------------------------


def add_policy_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", help="A .jsonl file with a problem a line.")
    data.add_argument("--dataset_name", help="Data set of the Hub or a local one, for the `datasets` package.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--cache_dir")
    data.add_argument("--prompt_column", default="prompt")
    data.add_argument("--answer_column", default="answer", help="What the reward gets beside the completion.")
    data.add_argument("--max_prompt_length", type=int, default=256, help="Tokens; a longer prompt is refused.")
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--reward", default="exact_match",
        help=f"{', '.join(REWARDS)}, or package.module:function of completions, answers and prompts.",
    )  # fmt: skip
    policy.add_argument("--max_completion_length", type=int, default=128, help="Tokens of an answer, one block.")
    policy.add_argument("--num_inference_steps", type=int, help="Steps of a run.")
    policy.add_argument("--num_generations", type=int, help="Completions a prompt.")
    policy.add_argument("--num_iterations", type=int, help="Optimizer steps a round.")
    policy.add_argument("--temperature", type=float)
    policy.add_argument("--epsilon", type=float, help="Of the clipped ratio.")
    policy.add_argument("--beta", type=float, help="Weight of the distance to the model as it was.")
    policy.add_argument("--num_validation_prompts", type=int, default=16)
    add_run_arguments(parser)
    return parser


def check_policy_arguments(args: argparse.Namespace, states: int) -> None:
    """Refuse what cannot work, and set the micro-batches of an optimizer step: the `states` of a run that are trained."""
    check_common_arguments(args)
    least = {"max_prompt_length": 0, "num_generations": 2}
    for name in (
        "max_prompt_length", "max_completion_length", "num_inference_steps", "num_generations", "num_iterations",
        "num_validation_prompts",
    ):  # fmt: skip
        if getattr(args, name) < least.get(name, 1):
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least.get(name, 1)}.")
    if args.num_inference_steps > args.max_completion_length:
        raise ValueError(
            f"`--num_inference_steps` is {args.num_inference_steps}; {args.max_completion_length} tokens take at most as many."
        )
    for name in ("temperature", "epsilon", "beta"):
        value = getattr(args, name)
        if not 0 <= value < math.inf or (value == 0 and name != "beta"):
            raise ValueError(f"`--{name}` is {value}; it must be a number {'from' if name == 'beta' else 'above'} 0.")
    if args.gradient_accumulation_steps not in (1, states):
        raise ValueError(
            f"`--gradient_accumulation_steps` is {args.gradient_accumulation_steps}; what is accumulated are the {states} "
            "states of a run: leave it, and take a larger `--train_batch_size`."
        )
    args.gradient_accumulation_steps = states
