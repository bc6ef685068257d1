"""What tests of text samplers share: small languages, pipelines on their exact models, and tests of a law."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, LLaDA2Pipeline, ModelMixin

import diffusers_ext as dx
from diffusers_ext.oracles import EnumerableLanguage, EnumerableLanguageModel


def chain(length: int = 4, size: int = 3) -> EnumerableLanguage:
    """A Markov chain in which tokens decide their neighbours."""
    generator = torch.Generator().manual_seed(3)
    start, step = torch.rand(size, generator=generator), torch.rand(size, size, generator=generator) ** 2
    return EnumerableLanguage.markov(start, step, length)


def exact_model(language: EnumerableLanguage, **settings) -> EnumerableLanguageModel:
    return EnumerableLanguageModel.from_language(language, **settings)


class FormulaModel(ModelMixin, ConfigMixin):
    """A language model whose logits are a function of the tokens; `seen` has the arguments of its calls."""

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.register_buffer("nothing", torch.zeros(1))
        self.seen: list[dict] = []

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.seen.append({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids})
        return SimpleNamespace(logits=self.logits(input_ids))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(model, scheduler, **settings):
    return quiet(dx.MaskedDiffusionPipeline(model, scheduler, **settings))


def sample(pipe, count: int, length: int, seed: int = 0, **options):
    """The pipeline's output for `count` strings out of nothing."""
    options = {"gen_length": length, "num_texts_per_prompt": count, "output_type": "seq", **options}
    return pipe(generator=torch.Generator().manual_seed(seed), **options)


def stock_sample(model, scheduler, count: int, length: int, steps: int, seed: int = 0) -> torch.Tensor:
    """The same by the unmodified loop of diffusers."""
    pipe = quiet(LLaDA2Pipeline(model=model, scheduler=scheduler))
    return pipe(
        input_ids=torch.zeros(count, 0, dtype=torch.long),
        gen_length=length,
        block_length=length,
        num_inference_steps=steps,
        temperature=1.0,
        editing_threshold=None,
        eos_early_stop=False,
        mask_token_id=model.mask_token_id,
        output_type="seq",
        generator=torch.Generator().manual_seed(seed),
    ).sequences


def probability_of_such(tokens: torch.Tensor, language: EnumerableLanguage, law: torch.Tensor | None = None) -> float:
    """P value of Pearson's test of samples against a law of all strings; those expected less than 5 times are pooled.

    `law` is in the order of `language.codes`, as `unmasking_law` gives it; None is the language itself.
    """
    if law is None:
        places = language.num_symbols ** torch.arange(language.length - 1, -1, -1)
        strings = torch.arange(language.num_symbols**language.length)[:, None] // places % language.num_symbols
        law = language.log_prob(strings).exp()
    counts = torch.bincount(language.codes(tokens), minlength=len(law)).double()
    expected = len(tokens) * law
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 1e-9
    if bool((observed[~kept] > 0).any()):
        return 0.0
    statistic = ((observed - expected).square() / expected.clamp(min=1e-12))[kept].sum()
    return float(torch.special.gammaincc(torch.tensor((int(kept.sum()) - 1) / 2).double(), statistic / 2))
