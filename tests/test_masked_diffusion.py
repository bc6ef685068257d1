"""The pipeline for masked diffusion language models, and the scheduler that all unmasking schedulers extend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline
from transformers import AutoModelForMaskedLM, AutoTokenizer

import diffusers_ext as dx
from diffusers_ext.pipelines._block_policy import BlockPolicy
from tests.common import models
from tests.common.pipeline import SUITE
from tests.common.suite import Case, CommonCase
from tests.languages import FormulaModel, chain, exact_model, pipeline, quiet, sample

MASK, VOCABULARY = 9, 10


def formula(tokens):
    """`(batch, length, VOCABULARY)`; tokens look at one another."""
    places, v = torch.arange(tokens.shape[1]), torch.arange(VOCABULARY, dtype=torch.float64)
    seen = torch.sin(1.3 * tokens.double()[:, None, :] + 0.9 * (places[:, None] - places).abs()).sum(-1)
    return 4 * torch.sin(seen[..., None] + 1.7 * v + 0.2 * places[:, None])


def formula_pipeline(scheduler=None, **settings):
    return pipeline(FormulaModel(formula), dx.UnmaskingScheduler() if scheduler is None else scheduler, **settings)


def call(pipe, **options):
    return pipe(**{"mask_token_id": MASK, "output_type": "seq", "temperature": 0.0, **options})


@pytest.fixture(scope="module")
def verses():
    folder = dx.zoo_path("verses-mdlm")
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    return quiet(dx.MaskedDiffusionPipeline(model, dx.FirstHittingScheduler(), AutoTokenizer.from_pretrained(folder)))


# --- the rules of every pipeline -------------------------------------------------------------------------------------

COMMON = CommonCase(
    make=lambda: dx.MaskedDiffusionPipeline(models.masked_language_model(), dx.FirstHittingScheduler()),
    inputs=lambda steps: {
        "input_ids": torch.tensor([[1, 2, 3, 4]]), "mask_token_id": models.MASK, "gen_length": 8, "block_length": 4,
        "num_inference_steps": steps, "output_type": "seq",
    },
)  # fmt: skip
CASE = Case(dx.get_method("radd"), dx.MaskedDiffusionPipeline, (), COMMON, "masked_diffusion")
RULES = [rule for rule in SUITE.rules_of(CASE) if rule.name not in ("entry", "travels")]


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rules_of_pipelines(rule, tmp_path):
    SUITE.run(CASE, rule, models.World(tmp_path))


def test_self_contained(tmp_path):
    """Saved with its code, it is loaded by stock diffusers as other classes, to the same text."""
    pipe = quiet(COMMON.make())
    expected = models.draw(pipe, COMMON.inputs(3))
    dx.save_pretrained(pipe, tmp_path, card=False)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, tokenizer=None)
    assert not isinstance(loaded, dx.MaskedDiffusionPipeline)
    assert torch.equal(models.draw(loaded, COMMON.inputs(3)), expected)


# --- against the stock pipeline and scheduler ------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.3, 0.6, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_commits_are_those_of_the_stock_scheduler(threshold, steps):
    """At temperature 0, where both are deterministic."""

    def no_mask(tokens):  # the stock scheduler would draw the mask
        return formula(tokens).index_fill(-1, torch.tensor([MASK]), -1e4)

    options = {"gen_length": 8, "block_length": 4, "num_inference_steps": steps, "threshold": threshold}
    prompt = torch.tensor([[1, 5, 2, 7], [3, 3, 8, 0]])
    found = [
        call(pipeline(FormulaModel(no_mask), scheduler, attention=attention), input_ids=prompt, **options).sequences
        for scheduler, attention in (
            (dx.UnmaskingScheduler(), "block_causal"),
            (BlockRefinementScheduler(), "block_causal"),
        )
    ]
    stock = quiet(LLaDA2Pipeline(FormulaModel(no_mask), BlockRefinementScheduler()))
    found.append(
        stock(
            input_ids=prompt, mask_token_id=MASK, output_type="seq", temperature=0.0, editing_threshold=None,
            eos_early_stop=False, **options,
        ).sequences
    )  # fmt: skip
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_kinds_of_confidence():
    logits = torch.log(torch.tensor([[[0.5, 0.45, 0.05, 0.0], [0.4, 0.3, 0.3, 0.0], [0.45, 0.225, 0.325, 0.0]]]))
    first = {"probability": 0, "margin": 2, "entropy": 0}
    for kind, expected in first.items():
        scheduler = dx.UnmaskingScheduler(confidence=kind)
        scheduler.set_timesteps(3, block_length=3)
        result = scheduler.step(logits, 0, torch.full((1, 3), 3), mask_token_id=3)
        assert result.transfer_index[0].nonzero().item() == expected, kind
        assert result.prev_sample[0, expected] == 0 and (result.prev_sample == 3).sum() == 2
        assert result.sampled_probs[0, expected] == pytest.approx(float(logits[0, expected].softmax(-1)[0]))


def test_top_k_and_top_p():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    n, scheduler = 4000, dx.FirstHittingScheduler()
    scheduler.set_timesteps(1, block_length=1)
    for options, kept in (
        ({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.81}, 3), ({"top_p": 0.5}, 1), ({}, 4)
    ):  # fmt: skip
        drawn = scheduler.step(
            p.log().expand(n, 1, -1), 0, torch.full((n, 1), 4), mask_token_id=4, temperature=1.0,
            generator=torch.Generator().manual_seed(0), **options,
        ).prev_sample  # fmt: skip
        share = torch.bincount(drawn.flatten(), minlength=5) / n
        expected = torch.where(torch.arange(5) < kept, p, 0.0) / p[:kept].sum()
        assert (share - expected).abs().max() < 4 * (0.25 / n) ** 0.5 and share[kept:].sum() == 0


# --- rows ------------------------------------------------------------------------------------------------------------


def test_prompts_of_different_lengths_are_as_alone():
    pipe = formula_pipeline()
    prompts = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6]), torch.tensor([7, 8, 0])]
    alone = [call(pipe, input_ids=prompt, gen_length=6, block_length=3) for prompt in prompts]
    together = call(pipeline(MaskHeeding(), dx.UnmaskingScheduler()), input_ids=prompts, gen_length=6, block_length=3)
    for i in range(3):
        assert torch.equal(together.sequences[i], alone[i].sequences[0])
        assert together.num_calls[i] == alone[i].num_calls[0] and together.block_lengths[i] == [3, 3]


class MaskHeeding(FormulaModel):
    """The formula on what the attention mask shows of each row."""

    def __init__(self):
        super().__init__(formula)

    def forward(self, input_ids, attention_mask, position_ids):
        logits = torch.zeros(*input_ids.shape, VOCABULARY, dtype=torch.float64)
        for row, (tokens, kept) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            assert torch.equal(position_ids[row], torch.arange(len(tokens)))
            logits[row, : kept.sum()] = formula(tokens[None, kept])[0]
        return SimpleNamespace(logits=logits)


def test_padding_on_either_side_is_taken_off():
    pipe = formula_pipeline()
    expected = call(pipe, input_ids=torch.tensor([[1, 2, 3]]), gen_length=4).sequences
    for ids, kept in (([[0, 0, 1, 2, 3]], [[0, 0, 1, 1, 1]]), ([[1, 2, 3, 0]], [[1, 1, 1, 0]])):
        found = call(pipe, input_ids=torch.tensor(ids), attention_mask=torch.tensor(kept), gen_length=4)
        assert torch.equal(found.sequences, expected)


def test_infilling_keeps_what_is_given():
    prompt = torch.tensor([[1, MASK, 3, MASK, MASK, 6], [MASK, 2, 3, 4, 5, 6]])
    result = call(formula_pipeline(), input_ids=prompt)
    given = prompt != MASK
    assert torch.equal(result.sequences[given], prompt[given]) and (result.sequences != MASK).all()
    assert result.num_calls == [3, 1]
    more = call(formula_pipeline(), input_ids=prompt, gen_length=2).sequences
    assert more.shape == (2, 8) and torch.equal(more[:, :6][given], prompt[given])


def test_blocks_are_filled_from_left_to_right():
    states = []

    def callback(pipe, step, timestep, tensors):
        states.append(tensors["sequences"].clone())
        return {}

    result = call(
        formula_pipeline(),
        input_ids=torch.tensor([[1, 2]]),
        gen_length=7,
        block_length=3,
        callback_on_step_end=callback,
    )
    assert result.block_lengths == [[3, 3, 1]] and result.num_calls == [7]
    for number, state in enumerate(states, 1):
        filled = (state[0] != MASK).sum() - 2
        assert filled == number
        full = number // 3 * 3
        assert (state[0, 2 : 2 + full] != MASK).all()


# --- what the model gets ---------------------------------------------------------------------------------------------


def test_shifted_logits():
    """A model whose logits predict the token to the right, as Dream's, is read one place to the left."""

    def shifted(tokens):
        return torch.cat([formula(tokens)[:, 1:], torch.zeros(len(tokens), 1, VOCABULARY)], 1)

    expected = call(formula_pipeline(), input_ids=torch.tensor([[1, 2]]), gen_length=5).sequences
    pipe = pipeline(FormulaModel(shifted), dx.UnmaskingScheduler(), shift_logits=True)
    assert torch.equal(call(pipe, input_ids=torch.tensor([[1, 2]]), gen_length=5).sequences, expected)


@pytest.mark.parametrize("attention", ["padding", "full", "block_causal"])
def test_forms_of_attention(attention):
    pipe = formula_pipeline(attention=attention)
    call(pipe, input_ids=[torch.tensor([1, 2, 3]), torch.tensor([4])], gen_length=3, block_length=2)
    first = pipe.model.seen[0]
    mask = first["attention_mask"]
    if attention == "padding":
        assert mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
        return
    seen = mask
    assert mask.shape[1] == 1 and mask.dtype == torch.bool
    if attention == "full":
        assert seen[0].all() and seen[1, 0, :, :4].all() and not seen[1, 0, :, 4:].any()
    else:
        assert first["input_ids"].tolist() == [[1, 2, 3, MASK], [4, MASK, MASK, MASK]]
        rows = seen[:, 0].int().tolist()
        assert rows[0] == [[1, 1, 0, 0]] * 2 + [[1] * 4] * 2
        assert rows[1] == [[1, 1, 0, 0]] * 4  # it is in its first block


def test_bert_in_all_forms_of_attention():
    """A real model: with either form of the mask it gives the same text."""
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    found = []
    for attention in ("padding", "full"):
        pipe = pipeline(models.masked_language_model(), dx.FirstHittingScheduler(), attention=attention)
        found.append(
            pipe(
                input_ids=prompts, gen_length=5, mask_token_id=models.MASK, output_type="seq",
                generator=torch.Generator().manual_seed(0),
            ).sequences
        )  # fmt: skip
    assert torch.equal(*found)


def test_guidance():
    """One token: probabilities are p_u (p_c / p_u)^g, normalised."""
    language = chain(length=2)
    model, g = exact_model(language), 2.5
    pipe = pipeline(model, dx.FirstHittingScheduler())
    prompt = torch.tensor([[2, language.mask_token_id]]).expand(6000, -1)
    tokens = pipe(
        input_ids=prompt, guidance_scale=g, output_type="seq", generator=torch.Generator().manual_seed(0)
    ).sequences
    conditional, free = (model(torch.tensor([row])).logits[0, 1, :3] for row in ([2, 3], [3, 3]))
    expected = (free + g * (conditional - free)).softmax(-1)
    share = torch.bincount(tokens[:, 1], minlength=3) / len(tokens)
    assert (share - expected).abs().max() < 4 * (0.25 / len(tokens)) ** 0.5
    assert (expected - conditional.softmax(-1)).abs().max() > 0.05, "the test would not notice no guidance"


def test_the_scheduler_tells_what_is_decoded_during_calls_only():
    pipe, seen = formula_pipeline(), []
    plain = pipe.model.forward

    def forward(**kwargs):
        block = pipe.scheduler.current_block
        seen.append((block.rows.tolist(), block.columns.tolist(), block.number, block.step))
        return plain(**kwargs)

    pipe.model.forward = forward
    prompts = [torch.tensor([1, 2]), torch.tensor([MASK])]
    options = {"input_ids": prompts, "gen_length": 2, "block_length": 2, "guidance_scale": 2.0}
    between = []

    def callback(pipe, step, timestep, tensors):
        between.append(pipe.scheduler.current_block)
        return {}

    call(pipe, **options, callback_on_step_end=callback)
    assert between and set(between) == {None} and pipe.scheduler.current_block is None
    assert seen[0] == ([0, 1, 2, 3], [[2, 3], [0, 1], [2, 3], [0, 1]], 0, 0)
    assert seen[1][2:] == (0, 1) and seen[-1] == ([1, 3], [[2], [2]], 1, 0)

    def broken(**kwargs):
        raise models.Abort

    pipe.model.forward = broken
    with pytest.raises(models.Abort):
        call(pipe, **options)
    assert pipe.scheduler.current_block is None


# --- ends ------------------------------------------------------------------------------------------------------------


def test_text_ends_at_end_of_text():
    """Rows that are done take no more calls, and end-of-text follows them."""
    language = chain(length=8)
    pipe = pipeline(exact_model(language), dx.FirstHittingScheduler())
    result = sample(pipe, 200, 8, block_length=2, eos_token_id=1)
    ends = (result.sequences == 1).long().argmax(1)
    for row, end, calls in zip(result.sequences, ends.tolist(), result.num_calls, strict=True):
        if 1 in row:
            assert (row[end:] == 1).all() and calls <= end // 2 * 2 + 2
        else:
            assert calls == 8
    free = sample(pipe, 200, 8, block_length=2, eos_token_id=1, stop_at_eos=False)
    assert set(free.num_calls) == {8}


def test_interrupted_by_a_callback():
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {}

    pipe = formula_pipeline()
    result = call(pipe, input_ids=torch.tensor([[1]]), gen_length=6, callback_on_step_end=callback)
    assert (result.sequences == MASK).sum() == 3 and pipe.num_timesteps == 3


def test_a_callback_may_change_tokens():
    def callback(pipe, step, timestep, tensors):
        assert tensors["changed"].sum() == 1
        tokens = tensors["sequences"].clone()
        tokens[0, -1] = 4
        return {"sequences": tokens}

    result = call(
        formula_pipeline(), input_ids=torch.tensor([[1]]), gen_length=6, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["sequences", "changed"],
    )  # fmt: skip
    assert result.sequences[0, -1] == 4 and result.num_calls[0] <= 6


def test_a_scheduler_that_leaves_masks_is_an_error():
    class Lazy(dx.UnmaskingScheduler):
        def commit(self, now):
            return torch.zeros_like(now.masked)

    with pytest.raises(RuntimeError, match="Lazy left 6 masks after the 6 steps of block 0"):
        call(formula_pipeline(Lazy()), input_ids=torch.tensor([[1]]), gen_length=6)


def test_edits_after_the_block_is_full():
    """A scheduler that revises goes on in `max_post_steps`, until nothing changes."""

    class Counting(dx.UnmaskingScheduler):
        revises = True

        def revise(self, now, after):
            return torch.where(now.masked | (now.step >= 5), after, (after + 1) % MASK)

    result = call(
        formula_pipeline(Counting()),
        input_ids=torch.tensor([[1]]),
        gen_length=2,
        num_inference_steps=2,
        max_post_steps=9,
    )
    assert result.num_calls[0] == 6  # steps 0 to 4 change something, step 5 does not
    assert result.sequences.shape == (1, 2)


def test_rows_of_unequal_blocks():
    class Uneven(BlockPolicy):
        def lengths(self, number, remaining, total, logits):
            return torch.minimum(remaining, torch.arange(1, len(remaining) + 1))

    result = call(formula_pipeline(), input_ids=torch.tensor([[1], [2]]), gen_length=4, block_policy=Uneven())
    assert result.block_lengths == [[1, 1, 1, 1], [2, 2]] and result.num_calls == [4, 4]


def test_lengths_that_do_not_fit_are_refused():
    class Long(BlockPolicy):
        def lengths(self, number, remaining, total, logits):
            return remaining + 1

    with pytest.raises(ValueError, match="`block_policy` gave lengths \\[5\\]; allowed are 1 to \\[4\\]"):
        call(formula_pipeline(), input_ids=torch.tensor([[1]]), gen_length=4, block_policy=Long())


# --- text ------------------------------------------------------------------------------------------------------------


def test_texts_streaming_and_end(verses):
    from transformers import TextStreamer

    class Collect(TextStreamer):
        pieces = ()

        def on_finalized_text(self, text, stream_end=False):
            self.pieces = (*self.pieces, text)

    streamer = Collect(verses.tokenizer, skip_prompt=True)
    prompt = "And it came to pass"
    output = verses(
        prompt, gen_length=24, block_length=6, generator=torch.Generator().manual_seed(1), streamer=streamer
    )
    assert "".join(streamer.pieces) == output.texts[0] and len(streamer.pieces) > 3
    both = verses([prompt, "In the beginning God"], gen_length=4, generator=torch.Generator().manual_seed(1))
    assert len(both.texts) == 2 and both.sequences.shape == (2, 4)


def test_infilled_text(verses):
    mask = verses.tokenizer.mask_token
    text = verses(f"And the LORD{mask}{mask} Moses", generator=torch.Generator().manual_seed(0)).texts[0]
    assert text.startswith("And the LORD") and text.endswith("Moses")


def test_saved_and_loaded_with_its_tokenizer(verses, tmp_path):
    verses.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is dx.MaskedDiffusionPipeline and loaded.tokenizer.mask_token == verses.tokenizer.mask_token
    expected, found = (
        pipe("In the beginning", gen_length=6, generator=torch.Generator().manual_seed(0)).texts
        for pipe in (verses, loaded)
    )
    assert found == expected


def test_chats(verses):
    class Chatting:
        chat_template = "yes"
        eos_token_id, mask_token_id = 2, 3

        def apply_chat_template(self, chat, **options):
            return {"input_ids": [10 + len(chat), 4]}

        def decode(self, row, **options):
            return str(len(row))

    pipe = quiet(dx.MaskedDiffusionPipeline(verses.model, dx.FirstHittingScheduler()))
    pipe.tokenizer = Chatting()
    said = {"role": "user", "content": "hello"}
    for options in ({"prompt": "hello"}, {"messages": [said]}, {"messages": [[said], [said, said]]}):
        rows = len(options["messages"]) if isinstance(options.get("messages", [0])[0], list) else 1
        assert len(pipe(**options, gen_length=2, output_type="seq").sequences) == rows


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "text"}, "`prompt` is given, and the pipeline has no tokenizer"),
        ({"output_type": "text"}, "has no tokenizer"),
        ({"output_type": "pil"}, "`output_type` is 'pil'"),
        ({"mask_token_id": None}, "`mask_token_id` is None"),
        ({"gen_length": -1}, "`gen_length` is -1"),
        ({"gen_length": 0}, "nothing to fill"),
        ({"block_length": 0}, "`block_length` is 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"guidance_scale": "high"}, "`guidance_scale` is 'high'"),
        ({"num_texts_per_prompt": 0}, "`num_texts_per_prompt` is 0"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 rows"),
        ({"input_ids": torch.zeros(1, 2)}, "`input_ids` must hold integers"),
        ({"attention_mask": torch.ones(1, 2)}, "`attention_mask`"),
        ({"block_policy": 3}, "`block_policy` is 3"),
        ({"block_policy": BlockPolicy(), "block_length": 2}, "`block_length` and `block_policy`"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
        ({"streamer": SimpleNamespace(), "num_texts_per_prompt": 2}, "`streamer`"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        call(formula_pipeline(), **options)


def test_bad_constructors_and_pipelines():
    with pytest.raises(ValueError, match="`attention` is 'causal'"):
        formula_pipeline(attention="causal")
    with pytest.raises(ValueError, match="`block_length` is None"):
        call(formula_pipeline(attention="block_causal"))
    with pytest.raises(ValueError, match="`generator` is a list"):
        call(formula_pipeline(BlockRefinementScheduler()), generator=[torch.Generator()])

    class Blind(FormulaModel):
        def forward(self, input_ids):
            return SimpleNamespace(logits=self.logits(input_ids))

    with pytest.raises(ValueError, match="the model takes no `attention_mask`"):
        call(pipeline(Blind(formula), dx.UnmaskingScheduler()), input_ids=[torch.tensor([1, 2]), torch.tensor([3])])
    with pytest.raises(ValueError, match="the model takes 32"):
        COMMON.make()(mask_token_id=models.MASK, gen_length=40, output_type="seq")
    for settings, message in (
        ({"confidence": "high"}, "`confidence` is 'high'"),
        ({"threshold": "high"}, "`threshold` is 'high'"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.UnmaskingScheduler(**settings)
