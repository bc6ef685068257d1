"""The exact masked language model of an enumerable language, and imperfect ones near it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from .language import EnumerableLanguage

# Error rate of reading a token that the model assumes, e^-100: no string of a context that can occur loses a digit of
# its probability, and a context that cannot occur is read with the fewest errors that make it possible.
_READING_ERROR = math.exp(-100)


@dataclass
class LanguageModelOutput(BaseOutput):
    """Output of `EnumerableLanguageModel`.

    Args:
        logits: `(batch, tokens, V + 1)`, log-probabilities; that of the mask, the last, is -inf.
    """

    logits: torch.Tensor


class EnumerableLanguageModel(ModelMixin, ConfigMixin):
    r"""The exact masked language model of an `EnumerableLanguage`, called as a model of transformers is.

        model = EnumerableLanguageModel.from_language(language)
        pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler())
        pipe(input_ids=prompt, gen_length=6, mask_token_id=model.mask_token_id, output_type="seq")

    A context that no string of the language has, as parallel unmasking makes them, is read with the fewest errors that
    make it possible: the limit of an error rate that goes to zero.

    Three settings make it imperfect, applied in this order to the probabilities p of the V symbols:
    `smoothing` e gives (1 - e) p + e / V; `temperature` T gives :math:`p^{1/T}`; `perturbation` c adds to the logits
    fixed random numbers of standard deviation c (for c > 0 two contexts no longer have a joint distribution in common).

    Args:
        num_symbols, num_states, length, initial, symbols: sizes and settings of the language.
        leave_one_out: what to answer at a visible position: what the others say about it (true), or itself (false).
        smoothing, temperature, perturbation: as above.
        seed: of the perturbation.
    """

    transitions: torch.Tensor
    final: torch.Tensor
    errors: torch.Tensor

    @register_to_config
    def __init__(
        self,
        num_symbols: int = 2,
        num_states: int = 1,
        length: int = 4,
        initial: int = 0,
        symbols: str | None = None,
        leave_one_out: bool = False,
        smoothing: float = 0.0,
        temperature: float = 1.0,
        perturbation: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing <= 1:
            raise ValueError(f"`smoothing` is {smoothing!r}; allowed are 0 to 1.")
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature!r}; it must be positive.")
        if not perturbation >= 0:
            raise ValueError(f"`perturbation` is {perturbation!r}; it must not be negative.")
        stay = torch.eye(num_states, dtype=torch.float64)[:, None].repeat(1, num_symbols, 1)
        self.register_buffer("transitions", stay / num_symbols)  # every string equally likely
        self.register_buffer("final", torch.ones(num_states, dtype=torch.float64))
        if perturbation > 0:
            generator = torch.Generator().manual_seed(seed)
            shape = (length, num_symbols + 1, length, num_symbols)  # [j, x_j] moves the logits at [i, v]
            errors = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(length)
            self.register_buffer("errors", errors)
        self._language: EnumerableLanguage | None = None
        self._key: list[tuple[torch.Tensor, int]] = []

    @classmethod
    def from_language(
        cls,
        language: EnumerableLanguage,
        leave_one_out: bool = False,
        smoothing: float = 0.0,
        temperature: float = 1.0,
        perturbation: float = 0.0,
        seed: int = 0,
    ) -> EnumerableLanguageModel:
        """The model of a language; the settings are those of the class.

        Raises:
            ValueError: a setting is out of its range.
        """
        model = cls(
            num_symbols=language.num_symbols,
            num_states=len(language.final),
            length=language.length,
            initial=language.initial,
            symbols=language.symbols,
            leave_one_out=leave_one_out,
            smoothing=smoothing,
            temperature=temperature,
            perturbation=perturbation,
            seed=seed,
        )
        model.transitions.copy_(language.transitions)
        model.final.copy_(language.final)
        return model

    @property
    def mask_token_id(self) -> int:
        return self.config.num_symbols

    @property
    def language(self) -> EnumerableLanguage:
        """The language, from the weights of the model."""
        key = [(weights, weights._version) for weights in (self.transitions, self.final)]
        if self._language is None or any(a is not b or m != n for (a, m), (b, n) in zip(key, self._key, strict=True)):
            config = self.config
            transitions, final = self.transitions.detach().cpu(), self.final.detach().cpu()
            self._language = EnumerableLanguage(transitions, final, config.length, config.initial, config.symbols)
            self._key = key
        return self._language

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LanguageModelOutput | tuple[torch.Tensor]:
        """Log-probabilities of every token given the visible ones.

        Args:
            input_ids: integers `(batch, tokens)`: symbols, and `mask_token_id` where a token is to be predicted. Fewer
                tokens than the language's length are the beginning of a string, the rest of which is not known.
            attention_mask: `(batch, tokens)`, 0 where a token is not to be looked at; needed beyond the length.
            position_ids: `(batch, tokens)`, only 0, 1, 2, ... in every row.
            return_dict: whether to return an output object, or a tuple.

        Returns:
            `float64` logits; uniform ones at positions beyond the length.

        Raises:
            ValueError: shapes do not fit, tokens are outside the vocabulary or beyond the length, or other positions.
        """
        language = self.language
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` is {input_ids.dtype} of shape {tuple(input_ids.shape)}; it must hold integers, (batch, "
                "tokens)."
            )
        batch, count = input_ids.shape
        length, size, mask = language.length, language.num_symbols, language.mask_token_id
        places = torch.arange(count, device=input_ids.device)
        if position_ids is not None and not bool((position_ids == places).all()):
            raise ValueError(f"`position_ids` is {position_ids!r}; allowed are only 0, 1, 2, ... in every row.")
        looked_at = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if looked_at.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(looked_at.shape)} for `input_ids` of {tuple(input_ids.shape)}."
            )
        if bool(looked_at[:, length:].any()):
            raise ValueError(
                f"`input_ids` has {count} tokens, and the strings of this language {length}; beyond them "
                "`attention_mask` must be 0."
            )
        tokens = torch.full((batch, length), mask, dtype=torch.long, device=input_ids.device)
        inside = min(count, length)
        tokens[:, :inside] = torch.where(looked_at, input_ids, mask)[:, :inside]

        told = language.log_likelihood(tokens, uniform=_READING_ERROR)
        log_p = torch.log_softmax(language.log_context(told), -1)
        if not self.config.leave_one_out:
            visible = torch.log(torch.nn.functional.one_hot(tokens, size + 1)[..., :size].double())
            log_p = torch.where((tokens == mask)[..., None], log_p, visible)
        log_p = self._imperfect(log_p, tokens)

        logits = torch.full((batch, count, size + 1), -math.inf, dtype=torch.float64, device=input_ids.device)
        logits[..., :size] = -math.log(size)
        logits[:, :inside, :size] = log_p[:, :inside]
        return LanguageModelOutput(logits=logits) if return_dict else (logits,)

    def _imperfect(self, log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.smoothing > 0:
            log_p = torch.log((1 - config.smoothing) * log_p.exp() + config.smoothing / config.num_symbols)
        log_p = log_p / config.temperature
        if config.perturbation > 0:
            places = torch.arange(config.length, device=tokens.device)
            log_p = log_p + config.perturbation * self.errors.double()[places, tokens].sum(1)
        return torch.log_softmax(log_p, -1)
