"""SDAR, as far as it is there: block-wise decoding, and the exact cache, equal to no cache whatever happens to the tokens."""

from __future__ import annotations

import pytest
import torch
from diffusers import BlockRefinementScheduler

import diffusers_ext as dx
from tests.language_models import MASK, computed, generate, logits, masked_tokens, prompts, tiny, unmasked
from tests.test_masked_diffusion import COMMON as PIPELINE

COMMON = PIPELINE
pytestmark = pytest.mark.proof("exact")


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
