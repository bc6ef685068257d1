"""Measures of text models on cases with a known answer."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ext.metrics.text import (
    Likelihood,
    exact_nll,
    masked_nll_bound,
    token_entropy,
    tokens_per_second,
    validity,
)
from diffusers_ext.oracles import EnumerableLanguage, EnumerableLanguageModel, unmasking_law

LANGUAGE = EnumerableLanguage.brackets(length=6, depth=2, letters=2)
MASK = LANGUAGE.mask_token_id
MODEL = EnumerableLanguageModel.from_language(LANGUAGE)
TOKENS = LANGUAGE.sample(12, torch.Generator().manual_seed(0))


def imperfect(seed: int = 0) -> EnumerableLanguageModel:
    return EnumerableLanguageModel.from_language(LANGUAGE, smoothing=0.1, perturbation=0.7, seed=seed)


def uniform(size: int):
    """A model that knows nothing of `size` tokens."""
    return lambda input_ids, attention_mask=None: SimpleNamespace(logits=torch.zeros(*input_ids.shape, size))


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16, initializer_range=0.5)
    return BertForMaskedLM(config).eval()


class TestExact:
    @pytest.mark.parametrize("order", [None, torch.arange(5, -1, -1), torch.tensor([2, 5, 0, 3, 1, 4])])
    def test_oracle_in_any_order(self, order):
        result = exact_nll(MODEL, TOKENS, MASK, order=order, batch_size=7)
        torch.testing.assert_close(result.nats, -LANGUAGE.log_prob(TOKENS), rtol=0, atol=1e-10)
        assert result.tokens.tolist() == [6] * 12

    def test_an_inconsistent_model_depends_on_the_order(self):
        left, right = (exact_nll(imperfect(), TOKENS, MASK, order=o).nats for o in (None, torch.arange(5, -1, -1)))
        assert float((left - right).abs().min()) > 1e-3

    def test_order_by_hand(self):
        model, order, tokens = imperfect(), [2, 0, 1, 5, 4, 3], TOKENS[:1]
        seen, total = torch.full_like(tokens, MASK), 0.0
        for position in order:
            total -= float(model(seen).logits[0, position, tokens[0, position]])
            seen[0, position] = tokens[0, position]
        assert exact_nll(model, tokens, MASK, order=torch.tensor(order)).nats.item() == pytest.approx(total)

    def test_given_a_prompt(self):
        """-log p(x | prompt) = log p(prompt) - log p(x)."""
        scored = torch.zeros_like(TOKENS, dtype=torch.bool)
        scored[:, 2:] = True
        strings, log_p = LANGUAGE.strings()
        same = (strings[None, :, :2] == TOKENS[:, None, :2]).all(2)
        prompt = torch.logsumexp(torch.where(same, log_p, -math.inf), 1)
        result = exact_nll(MODEL, TOKENS, MASK, scored=scored)
        torch.testing.assert_close(result.nats, prompt - LANGUAGE.log_prob(TOKENS), rtol=0, atol=1e-10)
        assert result.tokens.tolist() == [4] * 12

    def test_a_string_outside_the_language_is_impossible(self):
        assert exact_nll(MODEL, LANGUAGE.encode([")aaaaa"]), MASK).nats.item() == math.inf

    def test_causal_model_against_its_own_loss(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
        tokens = torch.randint(0, 13, (5, 9))
        result = exact_nll(model, tokens, batch_size=2)
        assert result.tokens.tolist() == [8] * 5
        assert result.nats_per_token == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-5)

        longer = torch.cat([tokens, torch.zeros(5, 3, dtype=torch.long)], 1)
        attention_mask = torch.ones_like(longer)
        attention_mask[:, 9:] = 0
        torch.testing.assert_close(exact_nll(model, longer, attention_mask=attention_mask).nats, result.nats)


class TestBound:
    def test_tight_on_the_oracle(self):
        result = masked_nll_bound(MODEL, TOKENS, MASK, samples=None)
        torch.testing.assert_close(result.nats, -LANGUAGE.log_prob(TOKENS), rtol=0, atol=1e-10)

    def test_bounds_the_sampler_of_an_imperfect_model(self):
        """One token at a time in random order has a law in closed form, and the bound lies above it."""
        language = EnumerableLanguage.brackets(length=4, depth=1, letters=2)
        model = EnumerableLanguageModel.from_language(language, smoothing=0.1, perturbation=1.0)
        strings, _ = language.strings()
        bound = masked_nll_bound(model, strings, language.mask_token_id, samples=None).nats
        gap = bound + torch.log(unmasking_law(model, language)[language.codes(strings)])
        assert float(gap.min()) > 0 and float(gap.mean()) > 1e-3

    def test_mean_over_all_orders(self):
        model, tokens = imperfect(), TOKENS[:2, :4]
        orders = [exact_nll(model, tokens, MASK, order=torch.tensor(o)).nats for o in itertools.permutations(range(4))]
        bound = masked_nll_bound(model, tokens, MASK, samples=None).nats
        torch.testing.assert_close(torch.stack(orders).mean(0), bound, rtol=0, atol=1e-10)

    def test_the_integral_over_the_masking_ratio(self):
        """Gauss-Legendre in t of the expected cross-entropy weighted 1 / t, a polynomial in t."""
        model, tokens = imperfect(), TOKENS[:3]
        nodes, weights = np.polynomial.legendre.leggauss(6)
        total = torch.zeros(3, dtype=torch.float64)
        for bits in itertools.product([False, True], repeat=6):
            mask = torch.tensor(bits)
            log_p = model(tokens.masked_fill(mask, MASK)).logits.gather(2, tokens[..., None]).squeeze(2)
            loss = -torch.where(mask, log_p, 0.0).sum(1)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                total += loss * weight / node * node ** sum(bits) * (1 - node) ** (6 - sum(bits))
        bound = masked_nll_bound(model, tokens, MASK, samples=None).nats
        torch.testing.assert_close(bound, total, rtol=0, atol=1e-10)

    def test_sampled_masks_are_unbiased(self):
        model, tokens = imperfect(), TOKENS[:4]
        exact = masked_nll_bound(model, tokens, MASK, samples=None).nats
        runs = torch.stack([masked_nll_bound(model, tokens, MASK, samples=8, seed=s).nats for s in range(200)])
        error = (runs.mean(0) - exact) / (runs.std(0) / 200**0.5)
        assert float(error.abs().max()) < 4
        assert float(runs.std(0).min()) > 0

    def test_low_discrepancy_helps(self):
        """Against as many independent masks: 8 samples together, or the mean of 8 single ones."""
        model, tokens = imperfect(), TOKENS[:4]
        spread = {}
        for samples, repeats in ((8, 1), (1, 8)):
            runs = [
                torch.stack(
                    [
                        masked_nll_bound(model, tokens, MASK, samples=samples, seed=100 * s + r).nats
                        for r in range(repeats)
                    ]
                ).mean(0)
                for s in range(40)
            ]
            spread[samples] = float(torch.stack(runs).var(0).mean())
        assert spread[8] < spread[1]

    def test_same_seed_same_masks_whatever_the_batch(self):
        first, again, other = (
            masked_nll_bound(imperfect(), TOKENS, MASK, samples=16, seed=s, batch_size=b).nats
            for s, b in ((3, 64), (3, 5), (4, 64))
        )
        torch.testing.assert_close(first, again)
        assert not torch.allclose(first, other)

    def test_given_a_prompt(self):
        scored = torch.zeros_like(TOKENS, dtype=torch.bool)
        scored[:, 2:] = True
        exact = exact_nll(MODEL, TOKENS, MASK, scored=scored).nats
        for samples, tolerance in ((None, 1e-10), (2000, 0.3)):
            bound = masked_nll_bound(MODEL, TOKENS[:4], MASK, scored=scored[:4], samples=samples).nats
            torch.testing.assert_close(bound, exact[:4], rtol=0, atol=tolerance)

    def test_padding_does_not_count(self, bert):
        tokens = torch.randint(1, 10, (3, 5))
        padded = torch.cat([tokens, torch.zeros(3, 4, dtype=torch.long)], 1)
        attention_mask = torch.tensor([[1] * 5 + [0] * 4] * 3)
        short = masked_nll_bound(bert, tokens, 10, samples=None)
        long = masked_nll_bound(bert, padded, 10, attention_mask, samples=None)
        torch.testing.assert_close(short.nats, long.nats, rtol=1e-4, atol=1e-4)
        assert long.tokens.tolist() == [5, 5, 5]
        ragged = attention_mask.clone()
        ragged[0, 3:] = 0
        assert masked_nll_bound(bert, padded, 10, ragged, samples=4).tokens.tolist() == [3, 5, 5]

    def test_a_real_masked_model(self, bert):
        tokens = torch.randint(0, 10, (6, 5))
        exact = masked_nll_bound(bert, tokens, 10, samples=None)
        sampled = masked_nll_bound(bert, tokens, 10, samples=2000)
        assert sampled.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.05)
        orders = [exact_nll(bert, tokens, 10, order=torch.tensor(o)).nats for o in itertools.permutations(range(5))]
        torch.testing.assert_close(torch.stack(orders).mean(0), exact.nats, rtol=1e-4, atol=1e-4)

    def test_the_mask_gets_no_probability(self):
        def model(input_ids, attention_mask=None):
            logits = torch.zeros(*input_ids.shape, 5)
            logits[..., 4] = 100.0  # the mask
            return SimpleNamespace(logits=logits)

        tokens = torch.randint(0, 4, (3, 6))
        for result in (masked_nll_bound(model, tokens, 4, samples=None), exact_nll(model, tokens, 4)):
            assert result.nats_per_token == pytest.approx(math.log(4))


class TestLikelihood:
    def test_a_model_that_knows_nothing(self):
        result = masked_nll_bound(uniform(8), torch.randint(0, 8, (3, 5)), 8, samples=10)
        assert result.nats_per_token == pytest.approx(math.log(8), rel=0.3)  # the number of masks is random
        result = exact_nll(uniform(8), torch.randint(0, 8, (3, 5)), 8)
        assert result.perplexity == pytest.approx(8)
        assert result.bits_per_token == pytest.approx(3)

    def test_long_sequences_count_for_more(self):
        result = Likelihood(torch.tensor([10.0, 1.0]), torch.tensor([10, 2]))
        assert result.nats_per_token == pytest.approx(11 / 12)
        characters = result.per(torch.tensor([40, 4]))
        assert characters.nats_per_token == pytest.approx(11 / 44)
        assert characters.bits_per_token == pytest.approx(11 / 44 / math.log(2))

    def test_interval_covers(self):
        """95 percent of intervals hold the true value, here a ratio of 2 nats a token."""
        generator, covered = torch.Generator().manual_seed(0), 0
        for _ in range(100):
            tokens = torch.randint(5, 15, (60,), generator=generator)
            nats = 2 * tokens + 3 * torch.randn(60, generator=generator, dtype=torch.float64)
            low, high = Likelihood(nats, tokens).interval(resamples=400)
            covered += low < 2 < high
        assert 86 <= covered <= 100

    def test_no_interval_of_the_impossible(self):
        with pytest.raises(ValueError, match="1 of 2 sequences"):
            Likelihood(torch.tensor([1.0, math.inf]), torch.tensor([1, 1])).interval()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: exact_nll(MODEL, TOKENS.double(), MASK), "`input_ids` is"),
            (lambda: exact_nll(MODEL, TOKENS, MASK, batch_size=0), "`batch_size` is 0"),
            (lambda: exact_nll(MODEL, TOKENS, MASK, attention_mask=torch.ones(2, 6)), "`attention_mask` has shape"),
            (lambda: exact_nll(MODEL, TOKENS, MASK, scored=torch.ones(12, 6)), "`scored` is"),
            (lambda: exact_nll(MODEL, TOKENS, MASK, scored=torch.zeros(12, 6).bool()), "nothing to score"),
            (lambda: exact_nll(MODEL, TOKENS, int(TOKENS[0, 0])), "has the mask"),
            (lambda: exact_nll(MODEL, TOKENS, MASK, order=torch.tensor([0, 1, 2, 3, 4, 4])), "`order` is"),
            (lambda: exact_nll(MODEL, TOKENS, order=torch.arange(6)), "`order` is given for a causal model"),
            (lambda: exact_nll(MODEL, TOKENS, scored=torch.ones(12, 6).bool()), "does not predict it"),
            (
                lambda: masked_nll_bound(
                    MODEL, TOKENS, MASK, torch.tensor([[1] * 5 + [0]] * 12), torch.ones(12, 6).bool()
                ),
                "are padding",
            ),
            (lambda: masked_nll_bound(MODEL, TOKENS, MASK, samples=0), "`samples` is 0"),
            (
                lambda: masked_nll_bound(uniform(3), torch.zeros(1, 17, dtype=torch.long), 2, samples=None),
                "`samples` is None with 17 to 17",
            ),
            (lambda: Likelihood(torch.ones(2), torch.ones(2)).per(torch.tensor([1, 0])), "`units` has shape"),
            (lambda: validity(TOKENS[:0], LANGUAGE), "`samples` is empty"),
            (lambda: token_entropy(torch.zeros(4)), "`samples` has shape"),
            (lambda: token_entropy(TOKENS, torch.zeros(12, 6)), "a token in every row"),
            (lambda: tokens_per_second({"a": int, "b": int}, 0, "a"), "`tokens` is 0"),
            (lambda: tokens_per_second({"a": int, "b": int}, {"a": 3}, "a"), "`tokens` is {'a': 3}"),
        ],
    )
    def test_bad_input_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestSamples:
    def test_validity(self):
        tokens = LANGUAGE.encode(["(aa)bb", "aaaaaa", "(((aaa", "a_aaaa"])
        result = validity(tokens, LANGUAGE)
        assert (result.value, result.count) == (0.5, 4)
        assert result.interval == pytest.approx((0.15004, 0.84996), abs=1e-5)  # Wilson's, of 2 in 4
        every = validity(LANGUAGE.sample(10), LANGUAGE)
        assert every.value == 1 and every.interval == pytest.approx((0.72246, 1.0), abs=1e-5)  # of 10 in 10

    def test_token_entropy(self):
        tokens = torch.tensor([[3, 3, 3, 3], [0, 1, 2, 3], [0, 0, 1, 1], [5, 5, 5, 7]])
        expected = [0, math.log(4), math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
        assert token_entropy(tokens).tolist() == pytest.approx(expected, abs=1e-12)
        attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
        expected = [0, math.log(2), 0, 0]
        assert token_entropy(tokens, attention_mask).tolist() == pytest.approx(expected, abs=1e-12)


class TestSpeed:
    def test_rates_by_a_clock_of_our_own(self):
        now = [0.0]

        def takes(seconds: float):
            def run() -> None:
                now[0] += seconds

            return run

        runs = {"base": takes(2.0), "fast": takes(0.5), "short": takes(1.0)}
        tokens = {"base": 100, "fast": 100, "short": 40}
        result = tokens_per_second(runs, tokens, "base", repeats=3, clock=lambda: now[0], synchronize=lambda: None)
        assert result.rates == pytest.approx({"base": 50, "fast": 200, "short": 40})
        assert result.speedups["fast"].median == pytest.approx(4)
        assert result.speedups["short"].median == pytest.approx(0.8)
        assert result.noise.median == pytest.approx(1) and result.noise.interval == pytest.approx((1, 1))
        same = tokens_per_second(runs, 10, "base", repeats=2, clock=lambda: now[0], synchronize=lambda: None)
        assert same.rates["short"] == pytest.approx(10)
        assert same.times.seconds["base"] == pytest.approx(2)
