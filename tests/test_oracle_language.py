"""The enumerable language and its exact model, against sums over all strings."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.oracles import EnumerableLanguage, EnumerableLanguageModel, total_variation, unmasking_law

BRACKETS = EnumerableLanguage.brackets(length=5, depth=2, letters=2)
BRACKETS_MODEL = EnumerableLanguageModel.from_language(BRACKETS)


def markov(length: int = 5, size: int = 3) -> EnumerableLanguage:
    generator = torch.Generator().manual_seed(3)
    start, step = torch.rand(size, generator=generator), torch.rand(size, size, generator=generator) ** 2
    return EnumerableLanguage.markov(start, step, length)


def all_strings(language: EnumerableLanguage) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(language.num_symbols)] * language.length)


def balanced(text: str) -> bool:
    stack, depth = [], 0
    for symbol in text:
        if symbol in "([":
            stack.append(symbol)
        elif symbol in ")]" and (not stack or stack.pop() + symbol not in ("()", "[]")):
            return False
        depth = max(depth, len(stack))
    return not stack and depth <= 2


def marginals(language: EnumerableLanguage, weights: torch.Tensor, strings: torch.Tensor) -> torch.Tensor:
    """`(length, V)` shares of tokens among weighted strings."""
    onehot = torch.nn.functional.one_hot(strings, language.num_symbols).double()
    return (weights[:, None, None] * onehot).sum(0) / weights.sum()


class TestLanguage:
    def test_probabilities_of_a_markov_chain(self):
        start, step = torch.tensor([0.2, 0.8]), torch.tensor([[0.5, 0.5], [0.1, 0.9]])
        language = EnumerableLanguage.markov(start, step, 3)
        assert language.log_prob(torch.tensor([[1, 0, 1]])).exp().item() == pytest.approx(0.8 * 0.1 * 0.5)
        assert language.log_prob(all_strings(language)).exp().sum().item() == pytest.approx(1)

    def test_brackets_are_the_balanced_strings(self):
        strings = all_strings(BRACKETS)
        valid = [balanced(text) for text in BRACKETS.decode(strings)]
        assert BRACKETS.validity(strings).tolist() == valid
        assert BRACKETS.num_strings == sum(valid)
        listed, log_p = BRACKETS.strings()
        assert torch.equal(listed, strings[torch.tensor(valid)])
        torch.testing.assert_close(log_p, BRACKETS.log_prob(listed))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("language", [BRACKETS, markov(), markov(1, 4)])
    def test_entropy(self, language):
        _, log_p = language.strings()
        assert language.entropy() == pytest.approx(-float((log_p.exp() * log_p).sum()), abs=1e-10)

    def test_large_languages_need_no_enumeration(self):
        language = EnumerableLanguage.brackets(length=12, depth=3, letters=12)
        assert language.num_symbols == 16 and language.num_strings > 1e12
        sample = language.sample(2000)
        nll = -language.log_prob(sample)
        assert float(nll.mean()) == pytest.approx(language.entropy(), abs=5 * float(nll.std()) / 2000**0.5)
        with pytest.raises(ValueError, match="at most"):
            language.strings()

    def test_samples_have_the_distribution(self):
        result = total_variation(BRACKETS.sample(20_000), BRACKETS)
        assert result.invalid == 0 and result.value < 1.2 * result.noise

    def test_samples_given_some_tokens(self):
        tokens = BRACKETS.encode(["(___a"])
        drawn = BRACKETS.sample(5000, log_likelihood=BRACKETS.log_likelihood(tokens))
        assert bool((drawn[:, [0, 4]] == tokens[:, [0, 4]]).all())
        strings, log_p = BRACKETS.strings()
        fits = (strings[:, 0] == tokens[0, 0]) & (strings[:, 4] == tokens[0, 4])
        expected = marginals(BRACKETS, log_p[fits].exp(), strings[fits])
        counted = marginals(BRACKETS, torch.ones(5000), drawn)
        torch.testing.assert_close(counted, expected, rtol=0, atol=5 * 0.5 / 5000**0.5)

    def test_codes_and_texts(self):
        strings = all_strings(BRACKETS)
        assert torch.equal(BRACKETS.codes(strings), torch.arange(len(strings)))
        texts = ["(a)_b", "_____"]
        assert BRACKETS.decode(BRACKETS.encode(texts)) == texts
        assert BRACKETS.log_prob(BRACKETS.encode(texts)).tolist() == [-math.inf, -math.inf]  # not finished

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: EnumerableLanguage(torch.ones(2, 2), torch.ones(2), 3), "`transitions` has shape"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.ones(2), 3), "`final` has shape"),
            (lambda: EnumerableLanguage(-torch.ones(1, 2, 1), torch.ones(1), 3), "`transitions` has the weight"),
            (lambda: EnumerableLanguage(torch.ones(2, 2, 2), torch.ones(2), 3), "to two states"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.ones(1), 0), "`length` is 0"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.ones(1), 62), "`length` is 62"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.ones(1), 3, initial=1), "`initial` is 1"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.ones(1), 3, symbols="aa"), "`symbols` is 'aa'"),
            (lambda: EnumerableLanguage(torch.ones(1, 2, 1), torch.zeros(1), 3), "allow no string"),
            (lambda: EnumerableLanguage.markov(torch.ones(2), torch.ones(3, 3), 3), "`start` has shape"),
            (lambda: EnumerableLanguage.brackets(depth=4), "`depth` is 4"),
            (lambda: EnumerableLanguage.brackets(letters=0), "`letters` is 0"),
            (lambda: BRACKETS.log_prob(torch.zeros(2, 4, dtype=torch.long)), "`tokens` is"),
            (lambda: BRACKETS.log_prob(torch.full((1, 5), 7)), "values from 7 to 7"),
            (lambda: BRACKETS.codes(torch.full((1, 5), 6)), "has masks"),
            (lambda: BRACKETS.encode("(a)ab"), "a list is needed"),
            (lambda: BRACKETS.encode(["(x)ab"]), "has '\\(x\\)ab'"),
            (lambda: BRACKETS.sample(0), "`n` is 0"),
            (
                lambda: BRACKETS.sample(1, log_likelihood=BRACKETS.log_likelihood(BRACKETS.encode([")____"]))),
                "leaves no string",
            ),
            (lambda: BRACKETS.log_context(torch.zeros(1, 5, 5)), "`log_likelihood` has shape"),
            (lambda: total_variation(torch.zeros(0, 5, dtype=torch.long), BRACKETS), "`tokens` is empty"),
            (lambda: unmasking_law(BRACKETS_MODEL, EnumerableLanguage.brackets(8)), "partly masked strings"),
            (lambda: unmasking_law(BRACKETS_MODEL, BRACKETS, [0.5, 0.5]), "the last 1"),
            (lambda: unmasking_law(BRACKETS_MODEL, BRACKETS, []), "the last 1"),
        ],
    )
    def test_bad_input_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestPosterior:
    @settings(max_examples=60, deadline=None)
    @given(text=st.text(BRACKETS.symbols + "____", min_size=5, max_size=5))
    def test_any_context(self, text):
        """Given the strings that differ least from what is visible, and those only."""
        tokens = BRACKETS.encode([text])
        strings, log_p = BRACKETS.strings()
        errors = ((tokens != BRACKETS.mask_token_id) & (tokens != strings)).sum(1)
        fits = errors == errors.min()
        expected = marginals(BRACKETS, log_p[fits].exp(), strings[fits])
        answer = BRACKETS_MODEL(tokens).logits[0].exp()
        masked = tokens[0] == BRACKETS.mask_token_id
        torch.testing.assert_close(answer[masked, :-1], expected[masked], rtol=0, atol=1e-12)
        assert bool((answer[:, -1] == 0).all())
        visible = torch.nn.functional.one_hot(tokens[0], 7).double()
        torch.testing.assert_close(answer[~masked], visible[~masked], rtol=0, atol=0)

    def test_many_contradictions(self):
        """Half a context for each of two strings, eight errors away from either: e^-800 does not underflow."""
        language = EnumerableLanguage.markov(torch.tensor([0.3, 0.7]), torch.eye(2), 17)
        tokens = language.encode(["aaaaaaaa_bbbbbbbb", "aaaaaaaaa_bbbbbbb"])
        answer = EnumerableLanguageModel.from_language(language)(tokens).logits.exp()
        assert answer[0, 8].tolist() == pytest.approx([0.3, 0.7, 0])
        assert answer[1, 9].tolist() == pytest.approx([1, 0, 0])

    def test_leave_one_out(self):
        model = EnumerableLanguageModel.from_language(BRACKETS, leave_one_out=True)
        for text in ("(a)ba", "(_)_a", "aa[b]"):
            tokens = BRACKETS.encode([text])
            answer = model(tokens).logits[0].exp()
            for position in range(5):
                others = tokens.clone()
                others[0, position] = BRACKETS.mask_token_id
                expected = BRACKETS_MODEL(others).logits[0, position].exp()
                torch.testing.assert_close(answer[position], expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(("alpha", "uniform"), [(0.7, 0.02), (torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.0]))])
    def test_mixed_noise(self, alpha, uniform):
        """Posterior of clean tokens under masks and wrong tokens, by a sum over all strings."""
        tokens = BRACKETS.encode(["(a)_a", "[b]a_"])
        told = BRACKETS.log_likelihood(tokens, alpha, uniform)
        answer = torch.softmax(BRACKETS.log_context(told) + told, -1)
        strings, log_p = BRACKETS.strings()
        rates = zip(torch.as_tensor(alpha).expand(2), torch.as_tensor(uniform).expand(2), strict=True)
        for row, (keep, noise) in enumerate(rates):
            same = tokens[row] == strings
            chance = torch.where(tokens[row] == BRACKETS.mask_token_id, 1.0, keep.double() * same + noise.double())
            expected = marginals(BRACKETS, log_p.exp() * chance.prod(1), strings)
            torch.testing.assert_close(answer[row], expected, rtol=0, atol=1e-7)  # the rates are float32

    def test_evidence(self):
        """Context and likelihood together sum to the probability of what is seen, at every position."""
        tokens = BRACKETS.encode(["(_)_a"])
        told = BRACKETS.log_likelihood(tokens)
        strings, log_p = BRACKETS.strings()
        fits = ((tokens == BRACKETS.mask_token_id) | (tokens == strings)).all(1)
        evidence = torch.logsumexp(BRACKETS.log_context(told) + told, -1)
        torch.testing.assert_close(evidence, torch.logsumexp(log_p[fits], 0).expand(1, 5), rtol=0, atol=1e-12)
        impossible = BRACKETS.log_context(BRACKETS.log_likelihood(BRACKETS.encode([")__)_"])))
        assert bool((impossible[0, 1:3] == -math.inf).all())

    def test_a_prefix_leaves_the_rest_open(self):
        whole = BRACKETS_MODEL(BRACKETS.encode(["(a___", "___]_"])).logits
        short = BRACKETS_MODEL(BRACKETS.encode(["(a___", "____]"])[:, :3]).logits
        torch.testing.assert_close(short[0], whole[0, :3])

    def test_what_is_not_attended_to_is_not_known(self):
        tokens = BRACKETS.encode(["(a)ba"])
        attention_mask = torch.tensor([[1, 0, 1, 1, 0]])
        hidden = BRACKETS_MODEL(BRACKETS.encode(["(_)b_"])).logits
        assert torch.equal(BRACKETS_MODEL(tokens, attention_mask=attention_mask).logits, hidden)
        longer = torch.cat([tokens, tokens], 1)
        attention_mask = torch.cat([attention_mask, torch.zeros(1, 5, dtype=torch.long)], 1)
        answer = BRACKETS_MODEL(longer, attention_mask, torch.arange(10)[None]).logits
        assert torch.equal(answer[:, :5], hidden)
        torch.testing.assert_close(answer[:, 5:].exp().sum(-1), torch.ones(1, 5, dtype=torch.float64))

    def test_fast(self):
        language = EnumerableLanguage.brackets(length=12, depth=3, letters=12)
        model = EnumerableLanguageModel.from_language(language)
        tokens = language.sample(64)
        tokens[torch.rand(64, 12) < 0.5] = language.mask_token_id
        seconds = []
        for _ in range(10):
            began = time.process_time()
            model(tokens)
            seconds.append(time.process_time() - began)
        assert min(seconds) < 0.05


class TestModel:
    def test_saved_and_loaded(self, tmp_path):
        model = EnumerableLanguageModel.from_language(BRACKETS, perturbation=0.5, smoothing=0.01, seed=4)
        model.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
        loaded = EnumerableLanguageModel.from_pretrained(tmp_path)
        tokens = BRACKETS.encode(["(___a", "_____"])
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert loaded.language.symbols == BRACKETS.symbols
        assert torch.equal(loaded.transitions, BRACKETS.transitions)
        assert EnumerableLanguageModel.from_config(model.config).config == model.config

    def test_new_weights_are_a_new_language(self):
        model = EnumerableLanguageModel.from_language(markov())
        tokens = torch.full((1, 5), 3)
        before = model(tokens).logits
        other = EnumerableLanguage.markov(torch.ones(3), torch.rand(3, 3), 5)
        model.load_state_dict({"transitions": other.transitions, "final": other.final})
        after = model(tokens).logits
        assert not torch.allclose(before[..., :3], after[..., :3])
        torch.testing.assert_close(after, EnumerableLanguageModel.from_language(other)(tokens).logits)

    def test_temperature_and_smoothing(self):
        tokens = BRACKETS.encode(["(____", "_a_]_"])
        exact = BRACKETS_MODEL(tokens).logits[..., :-1].exp()
        hot = EnumerableLanguageModel.from_language(BRACKETS, temperature=2.0)(tokens).logits[..., :-1].exp()
        torch.testing.assert_close(hot, exact.sqrt() / exact.sqrt().sum(-1, keepdim=True))
        smooth = EnumerableLanguageModel.from_language(BRACKETS, smoothing=0.3)(tokens).logits[..., :-1].exp()
        torch.testing.assert_close(smooth, 0.7 * exact + 0.05)

    def test_perturbation(self):
        generator = torch.Generator().manual_seed(0)
        language = markov()
        tokens = torch.randint(0, 4, (400, 5), generator=generator)
        exact = EnumerableLanguageModel.from_language(language, smoothing=0.1)(tokens).logits[..., :3]
        moved = EnumerableLanguageModel.from_language(language, smoothing=0.1, perturbation=0.4)(tokens).logits[..., :3]
        error = moved - exact
        error = error - error.mean(-1, keepdim=True)  # logits are known up to a constant
        assert float(error.square().mean().sqrt()) == pytest.approx(0.4 * (2 / 3) ** 0.5, rel=0.15)
        again = EnumerableLanguageModel.from_language(language, smoothing=0.1, perturbation=0.4)(tokens).logits[..., :3]
        assert torch.equal(again, moved)
        other = EnumerableLanguageModel.from_language(language, smoothing=0.1, perturbation=0.4, seed=1)
        assert not torch.allclose(other(tokens).logits[..., :3], moved)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: EnumerableLanguageModel(smoothing=1.5), "`smoothing` is 1.5"),
            (lambda: EnumerableLanguageModel(temperature=0.0), "`temperature` is 0.0"),
            (lambda: EnumerableLanguageModel(perturbation=-1.0), "`perturbation` is -1.0"),
            (lambda: BRACKETS_MODEL(torch.zeros(5, dtype=torch.long)), "`input_ids` is"),
            (lambda: BRACKETS_MODEL(torch.zeros(1, 6, dtype=torch.long)), "`input_ids` has 6 tokens"),
            (lambda: BRACKETS_MODEL(torch.full((1, 5), 9)), "values from 9"),
            (lambda: BRACKETS_MODEL(torch.zeros(1, 5).long(), torch.ones(1, 4)), "`attention_mask` has shape"),
            (lambda: BRACKETS_MODEL(torch.zeros(1, 5).long(), None, torch.ones(1, 5)), "`position_ids` is"),
        ],
    )
    def test_bad_input_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


# --- unmasking -------------------------------------------------------------------------------------------------------


def ancestral(steps: int) -> list[float]:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return [*((times[:-2] - times[1:-1]) / times[:-2]).tolist(), 1.0]


def distance(law: torch.Tensor, language: EnumerableLanguage) -> float:
    return float((law - language.log_prob(all_strings(language)).exp()).abs().sum()) / 2


def chi_square_p_value(tokens: torch.Tensor, language: EnumerableLanguage) -> float:
    """Of Pearson's test of samples against the language; strings of fewer than 5 expected samples are pooled."""
    strings, log_p = language.strings()
    counts = torch.bincount(language.codes(tokens), minlength=language.num_symbols**language.length)
    observed, expected = counts[language.codes(strings)].double(), len(tokens) * log_p.exp()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((observed - expected).square() / expected.clamp(min=1e-9))[keep].sum()
    return float(torch.special.gammaincc(torch.tensor((int(keep.sum()) - 1) / 2), statistic.float() / 2))


class FirstHitting(BlockRefinementScheduler):
    """One masked position a row, chosen uniformly, its token drawn from the model: any-order autoregression."""

    def step(self, model_output, timestep, sample, *, mask_token_id=None, generator=None, **options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None, "use_multinomial": True}
        drawn, probs = self._sample_from_logits(model_output, generator=generator, **options)
        masked = sample == mask_token_id
        chosen = torch.multinomial(masked.double().clamp(min=1e-30), 1, generator=generator)
        transfer = torch.zeros_like(masked).scatter(1, chosen, True) & masked
        result = torch.where(transfer, drawn, sample)
        return BlockRefinementSchedulerOutput(result, transfer, torch.zeros_like(masked), drawn, probs, model_output)


def generate(model, scheduler, count, gen_length=5, block_length=5, prompt=None, **options):
    pipe = LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.zeros(count, 0, dtype=torch.long) if prompt is None else prompt
    options = {"temperature": 1.0, "editing_threshold": None, "eos_early_stop": False, **options}
    return pipe(
        input_ids=prompt,
        gen_length=gen_length,
        block_length=block_length,
        mask_token_id=model.mask_token_id,
        output_type="seq",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).sequences


class TestUnmasking:
    def test_one_at_a_time_is_the_language(self):
        language = markov()
        assert distance(unmasking_law(EnumerableLanguageModel.from_language(language), language), language) < 1e-12
        assert distance(unmasking_law(BRACKETS_MODEL, BRACKETS), BRACKETS) < 1e-12

    def test_steps_are_off_by_one_over_their_number(self):
        """Of the ancestral sampler (Ou et al. 2024): independent draws in one step miss what ties them."""
        language = markov()
        model = EnumerableLanguageModel.from_language(language)
        distances = [distance(unmasking_law(model, language, ancestral(n)), language) for n in (4, 8, 16, 32)]
        assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(distances))
        assert distances[0] > 0.05

    def test_one_step_is_the_product_of_marginals(self):
        language = markov()
        model = EnumerableLanguageModel.from_language(language)
        law = unmasking_law(model, language, [1.0])
        single = model(torch.full((1, 5), 3)).logits[0].exp()
        product = torch.stack([single[i][all_strings(language)[:, i]] for i in range(5)]).prod(0)
        torch.testing.assert_close(law, product)

    def test_laws_are_those_of_samples(self):
        language = markov(length=3)
        model = EnumerableLanguageModel.from_language(language, perturbation=1.0)
        rates, n = ancestral(2), 40_000
        state = torch.full((n, 3), 3)
        for rate in rates:
            drawn = torch.distributions.Categorical(logits=model(state).logits).sample()
            state = torch.where((state == 3) & (torch.rand(n, 3) < rate), drawn, state)
        frequencies = torch.bincount(language.codes(state), minlength=27) / n
        law = unmasking_law(model, language, rates)
        torch.testing.assert_close(frequencies.double(), law, rtol=0, atol=5 * 0.5 / n**0.5)
        assert distance(law, language) > 0.05

    def test_imperfect_models_are_seen(self):
        for setting in ({"perturbation": 1.0}, {"temperature": 0.7}, {"smoothing": 0.2}):
            model = EnumerableLanguageModel.from_language(BRACKETS, **setting)
            law = unmasking_law(model, BRACKETS)
            assert law.sum().item() == pytest.approx(1)
            assert distance(law, BRACKETS) > 0.03

    def test_any_order_sampling_in_the_stock_pipeline(self):
        """Exact in distribution through the unmodified loop, one token a call (Zheng et al. 2024)."""
        language = markov(length=4)
        tokens = generate(
            EnumerableLanguageModel.from_language(language), FirstHitting(), 20_000, 4, 4, num_inference_steps=4
        )
        result = total_variation(tokens, language)
        assert result.value < 1.3 * result.noise
        assert chi_square_p_value(tokens, language) > 1e-3

    def test_the_test_sees_a_wrong_sampler(self):
        language = markov(length=4)
        model = EnumerableLanguageModel.from_language(language, temperature=0.9)
        tokens = generate(model, FirstHitting(), 20_000, 4, 4, num_inference_steps=4)
        assert chi_square_p_value(tokens, language) < 1e-6
        assert total_variation(tokens, language).value > 1.3 * total_variation(tokens, language).noise

    def test_stock_scheduler_in_the_stock_pipeline(self):
        """Commit by confidence: one token a step never leaves the language, all in one step often does."""
        careful = generate(BRACKETS_MODEL, BlockRefinementScheduler(), 200, num_inference_steps=5, threshold=2.0)
        assert bool(BRACKETS.validity(careful).all())
        hasty = generate(BRACKETS_MODEL, BlockRefinementScheduler(), 200, num_inference_steps=1, threshold=2.0)
        assert 0 < int(BRACKETS.validity(hasty).sum()) < 150
        result = total_variation(careful, BRACKETS)
        assert result.value > 1.4 * result.noise  # but it prefers likely strings

    def test_prompt_blocks_and_a_tail(self):
        """Block by block, from a prompt, with a last block that runs past the end of the string."""
        prompt = BRACKETS.encode(["([___"])[:, :2].expand(50, -1).contiguous()
        tokens = generate(
            BRACKETS_MODEL, FirstHitting(), 50, gen_length=3, block_length=2, prompt=prompt, num_inference_steps=2
        )
        strings = torch.cat([prompt, tokens[:, :3]], 1) if tokens.shape[1] == 3 else tokens[:, :5]
        assert bool((strings[:, :2] == prompt).all())
        assert bool(BRACKETS.validity(strings).all())


class TestTotalVariation:
    def test_known_values(self):
        language = EnumerableLanguage.markov(torch.tensor([0.5, 0.5, 0.0]), torch.eye(3), 1)
        tokens = torch.tensor([[0]] * 6 + [[1]] * 2 + [[2]] * 2)
        result = total_variation(tokens, language)
        assert result.invalid == pytest.approx(0.2)
        assert result.value == pytest.approx((0.1 + 0.3 + 0.2) / 2)
        certain = EnumerableLanguage.markov(torch.tensor([1.0, 0.0]), torch.eye(2), 2)
        assert total_variation(certain.sample(5), certain).value == 0
        assert total_variation(certain.sample(5), certain).noise == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("n", [1, 20, 1000])
    def test_noise_is_the_mean_of_exact_samples(self, n):
        language = markov(length=3)
        values = torch.tensor([total_variation(language.sample(n), language).value for _ in range(100)])
        noise = total_variation(language.sample(n), language).noise
        assert noise == pytest.approx(float(values.mean()), abs=5 * float(values.std()) / 10 + 1e-9)
