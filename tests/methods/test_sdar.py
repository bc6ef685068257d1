"""SDAR by the five proofs: block-wise decoding, the exact cache, and a block diffusion model out of an autoregressive one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import diffusers_ext as dx
from diffusers_ext.training.train_masked_diffusion_lm import masked_diffusion_loss
from diffusers_ext.training.train_sdar import (
    block_diffusion_loss,
    block_diffusion_mask,
    convert_to_block_diffusion,
    main,
)
from tests.card_snippets import run_card
from tests.common import trainer
from tests.language_models import MASK, computed, generate, hashed, logits, masked_tokens, prompts, tiny, unmasked
from tests.languages import FormulaModel, pipeline
from tests.methods import test_adablock
from tests.test_masked_diffusion import COMMON as PIPELINE
from tests.tiny_models import VERSES

COMMON = PIPELINE
GOLDEN = Path(__file__).parents[1] / "golden" / "sdar.json"
exact = pytest.mark.proof("exact")


# --- exact: the cache ------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_block_causal_model_computes_finished_blocks_once_more_and_never_again(dtype, bound):
    model = tiny("sdar").to(dtype)
    plain, calls = generate(model, prompts(2, 6), gen_length=12, block_length=4)
    dx.enable(model, dx.BlockCausalCacheConfig())
    counts = computed(model)
    tokens, cached = generate(model, prompts(2, 6), gen_length=12, block_length=4)
    assert torch.equal(tokens, plain)
    for (_, a), (_, b) in zip(calls, cached, strict=True):
        scale = max(a.abs().max().item(), 1.0)
        assert (a - b).abs().max() <= bound * scale
    # 18 tokens in blocks of 4 from 0; a token that settles in block k makes everything from 4k on new.
    assert counts[0] == 18 and max(counts[1:]) <= 14 and counts[-1] <= 6


@exact
@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_tokens_may_change_in_any_way(name):
    """Decoded, edited, masked again, another prompt, in rows of their own; with padding; growing at the end."""
    model = tiny(name).double()
    first = masked_tokens(2)
    changes = [
        unmasked(first, 5),
        unmasked(first, 5, 9),
        unmasked(first, 5, value=9),
        first,
        torch.cat([unmasked(first[:1], 1, value=2), first[1:]]),
        torch.cat([first[:1], unmasked(first[1:], 11)]),
        torch.cat([first, torch.full((2, 4), MASK)], 1),
        masked_tokens(3),
        first[:, :8],
    ]
    seen = [torch.ones_like(tokens) for tokens in changes]
    seen[4][0, :3] = 0
    plain = [logits(model, tokens, attention_mask=mask) for tokens, mask in zip(changes, seen, strict=True)]
    dx.enable(model, dx.BlockCausalCacheConfig())
    for tokens, mask, expected in zip(changes, seen, plain, strict=True):
        for _ in range(2):
            found = logits(model, tokens, attention_mask=mask)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@exact
def test_in_our_pipeline_the_model_sees_one_block():
    model = tiny("llada")  # has no mask of its own; the pipeline hands one over
    pipe = dx.MaskedDiffusionPipeline(model, BlockRefinementScheduler(), attention="block_causal")
    pipe.set_progress_bar_config(disable=True)
    call = {
        "input_ids": [torch.tensor([5, 6, 7]), torch.tensor([9, 10, 11, 12, 13])], "gen_length": 12, "block_length": 4,
        "temperature": 0.0, "threshold": 1.0, "mask_token_id": MASK, "output_type": "seq",
    }  # fmt: skip
    counts = computed(model)
    plain = pipe(**call).sequences
    without = sum(counts)
    dx.enable(pipe, dx.BlockCausalCacheConfig())
    counts.clear()
    assert torch.equal(pipe(**call).sequences, plain)
    # Steps inside a block compute the block alone; the first one of a block that before it, and what is new, as well.
    assert counts[:3] == [8, 4, 4] and sum(counts) < 0.7 * without


@exact
def test_layers_with_other_masks_and_times_are_refused():
    with pytest.raises(ValueError, match="not exact where each call has another time"):
        dx.enable(tiny("gidd"), dx.BlockCausalCacheConfig())
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            layer_types=["full_attention", "sliding_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs layers that all have the same mask"):
        dx.enable(model, dx.BlockCausalCacheConfig())


@exact
def test_gradients_and_changed_weights():
    """Calls for training are as without the cache, whichever weights are trained; weights changed in place are noticed."""
    model = tiny("sdar")
    model.requires_grad_(False)
    trained = dict(model.named_parameters())
    name = next(name for name in trained if name.endswith("v_proj.weight"))
    trained[name].requires_grad_(True)
    dx.enable(model, dx.BlockCausalCacheConfig())
    tokens = masked_tokens(2)
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens).logits.square().mean().backward()
        assert trained[name].grad.abs().sum() > 0
    before = logits(model, tokens)
    with torch.no_grad():
        trained[name].mul_(3)
    after = logits(model, tokens)
    dx.disable(model)
    assert torch.equal(after, logits(model, tokens)) and not torch.equal(after, before)


# --- exact: conversion and training ----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=500.0)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}


@exact
@pytest.mark.parametrize("name", CAUSAL)
def test_with_one_token_a_block_the_converted_model_is_the_autoregressive_one(name):
    model = hashed(CAUSAL[name]()).double()
    made, ids = convert_to_block_diffusion(model, 1, MASK), prompts(2, 11)
    torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=0, atol=1e-10)
    wider = convert_to_block_diffusion(model, 4, MASK)
    assert not torch.allclose(logits(wider, ids), logits(model, ids)), "tokens of a block see each other"
    weights = made.network.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    made.network.get_input_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0, "weights are copied"


@exact
def test_what_cannot_be_converted():
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    for model, block, mask, message in (
        (other, 4, 1, "`model` is of type 'gpt2'"),
        (CAUSAL["llama"](), 4, 50, "`mask_token_id` is 50; the model has 50"),
        (CAUSAL["llama"](), 0, 49, "`block_length` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_block_diffusion(model, block, mask)


@exact
def test_both_copies_in_one_call_are_as_each_block_alone():
    """A noisy block is computed as in decoding: after the clean blocks before it, by the model's own mask."""
    model = hashed(convert_to_block_diffusion(CAUSAL["qwen3"](), 4, MASK)).double()
    ids = prompts(2, 10)
    noisy = torch.where(torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.5, MASK, ids)
    places = torch.arange(10)
    both = logits(
        model, torch.cat([noisy, ids], 1), attention_mask=block_diffusion_mask(10, 4),
        position_ids=torch.cat([places, places])[None],
    )  # fmt: skip
    torch.testing.assert_close(both[:, 10:], logits(model, ids), rtol=0, atol=1e-10)
    for begin in range(0, 10, 4):
        alone = logits(model, torch.cat([ids[:, :begin], noisy[:, begin : begin + 4]], 1))
        torch.testing.assert_close(both[:, begin : min(begin + 4, 10)], alone[:, begin:], rtol=0, atol=1e-10)


@exact
def test_with_one_token_a_block_the_loss_is_the_likelihood():
    """And with one block a text that of masked diffusion."""
    causal = hashed(CAUSAL["llama"]()).double()
    ids, model = prompts(2, 6), convert_to_block_diffusion(causal, 1, MASK)
    wanted = 0.0
    for i in range(6):
        p = logits(model, torch.cat([ids[:, :i], torch.full((2, 1), MASK)], 1))[:, -1, :MASK].log_softmax(-1)
        wanted -= p.gather(1, ids[:, i : i + 1]).sum() / 12
    u = torch.full((2, 6), 0.4)
    with torch.no_grad():
        found = [block_diffusion_loss(model, ids, MASK, 1, torch.full((2, 6), t), u) for t in (1.0, 0.5, 0.3)]
        assert found[0].item() == pytest.approx(wanted.item(), rel=1e-5)
        assert found[1].item() == pytest.approx(2 * wanted.item(), rel=1e-5), "half of the time, with twice the weight"
        assert found[2].item() == 0

        whole = convert_to_block_diffusion(causal, 6, MASK)
        t, u = torch.tensor([0.7, 0.4]), torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
        one_block = block_diffusion_loss(whole, ids, MASK, 6, t[:, None], u)
        plain = masked_diffusion_loss(whole, ids, torch.ones_like(ids), MASK, t, u)
    assert one_block.item() == pytest.approx(plain.item(), rel=1e-6)


@exact
def test_blocks_have_noise_of_their_own():
    model, ids = tiny("sdar"), prompts(2, 10)
    u, t = torch.full((2, 10), 0.5), torch.tensor([[0.4, 0.6, 0.4], [0.4, 0.4, 0.8]])
    with torch.no_grad():
        found = block_diffusion_loss(model, ids, MASK, 4, t, u)
    noisy = ids.clone()
    noisy[0, 4:8], noisy[1, 8:] = MASK, MASK
    first = logits(model, torch.cat([ids[:1, :4], noisy[:1, 4:8]], 1))[0, 4:8, :MASK].log_softmax(-1)
    second = logits(model, torch.cat([ids[1:, :8], noisy[1:, 8:]], 1))[0, 8:, :MASK].log_softmax(-1)
    wanted = first.gather(1, ids[0, 4:8, None]).sum() / 0.6 + second.gather(1, ids[1, 8:, None]).sum() / 0.8
    assert found.item() == pytest.approx(-wanted.item() / 20, rel=1e-5)


def causal_lm(folder: Path) -> None:
    """A tiny autoregressive model, whose tokenizer has no mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<end>", *alphabet])}
    letters = Tokenizer(token_models.BPE(vocab=vocab, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": len(vocab), "num_hidden_layers": 1, "tie_word_embeddings": True}
    config = Qwen3Config(**sizes, head_dim=8)
    hashed(Qwen3ForCausalLM(config)).save_pretrained(folder)


def inputs(folder: Path) -> dict:
    if not (folder / "causal").is_dir():
        causal_lm(folder / "causal")
        (folder / "texts").mkdir()
        (folder / "texts" / "0.txt").write_text(VERSES[0])
    return {
        "pretrained_model_name_or_path": folder / "causal", "train_data_dir": folder / "texts", "max_seq_length": 10,
        "block_length": 4, "num_validation_texts": 1, "train_batch_size": 2,
    }  # fmt: skip


@exact
def test_the_trainer_keeps_the_rules_of_trainers(tmp_path):
    """Those of `tests/common`, which asks a pipeline's row for other ones."""
    trainer.hold_to_the_rules("sdar", inputs, tmp_path / "runs")


# --- reference -------------------------------------------------------------------------------------------------------

# The steps of a block are as many as its tokens, or divide them and the prompt fills whole blocks: elsewhere theirs draws
# visible tokens anew where a step's quota is larger than the masks that are left.
RUNS = {
    f"prompt of {length}, blocks of {block}, {steps} steps, threshold {threshold}": (length, block, steps, threshold)
    for length, block, steps, threshold in (
        (3, 4, 4, None), (8, 8, 4, None), (5, 4, 4, 0.5), (4, 8, 8, 0.3)
    )
}  # fmt: skip


@pytest.mark.proof("reference")
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_authors_decoder(run):
    length, block, steps, threshold = RUNS[run]
    golden = json.loads(GOLDEN.read_text())["runs"][run]
    prompt = test_adablock.PROMPTS[2].repeat(2)[:length]
    scheduler = dx.UnmaskingScheduler(threshold=threshold)
    pipe = pipeline(FormulaModel(test_adablock.golden_logits), scheduler, attention="block_causal")
    result = pipe(
        input_ids=prompt, gen_length=len(golden["tokens"]), block_length=block, num_inference_steps=steps,
        temperature=0.0, mask_token_id=test_adablock.MASK, output_type="seq", stop_at_eos=False,
    )  # fmt: skip
    assert result.sequences[0].tolist() == golden["tokens"]
    assert result.num_calls == [golden["calls"]]


@pytest.mark.proof("reference")
def test_equals_the_authors_mask():
    golden = json.loads(GOLDEN.read_text())["mask"]
    assert block_diffusion_mask(10, 4)[0, 0].long().tolist() == golden


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_trained_model_is_a_pipeline_folder(tmp_path):
    values = {**inputs(tmp_path), "output_dir": tmp_path / "out", "max_train_steps": 2, "learning_rate": 1e-3}
    main([part for name, value in values.items() for part in (f"--{name}", str(value))])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is dx.MaskedDiffusionPipeline and pipe.model.config.block_length == 4
    assert pipe.tokenizer.mask_token_id == pipe.model.config.mask_token_id == 257
    pipe.set_progress_bar_config(disable=True)
    call = {"gen_length": 9, "block_length": 4, "output_type": "seq", "temperature": 0.0}
    plain = pipe("In the", **call).sequences
    assert torch.equal(dx.enable(pipe, dx.BlockCausalCacheConfig())("In the", **call).sequences, plain)
    assert (plain != 257).all() and (tmp_path / "out" / "samples" / "step-000002.txt").is_file()


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("sdar")
    assert names["output"].texts and "## When not to use it" in card
