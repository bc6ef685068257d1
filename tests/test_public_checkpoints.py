"""Public checkpoints: their configurations and names of weights, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diffusers_ext as dx
from diffusers_ext.models.public_checkpoints import _LLADA_BLOCK, _LLADA_ROOT, checkpoint_format
from tests.language_models import CHECKPOINTS, MASK, MDLM, SDAR, logits, masked_tokens, tiny

GOLDEN = json.loads((Path(__file__).parent / "golden" / "public_checkpoints.json").read_text())


def theirs(name, weights):
    """Our weights under the names of the checkpoint."""
    if name == "llada":
        block = {ours: their for their, ours in _LLADA_BLOCK.items()}
        root = {ours: their for their, ours in _LLADA_ROOT.items()}

        def named(ours):
            stem, _, kind = ours.rpartition(".")
            if stem in root:
                return f"model.transformer.{root[stem]}.{kind}"
            _, _, number, part = stem.split(".", 3)
            return f"model.transformer.blocks.{number}.{block[part]}.{kind}"

        return {named(ours): value for ours, value in weights.items()}
    if name in ("mdlm", "gidd"):
        prefix = "backbone." if name == "mdlm" else ""
        renamed = {prefix + k.replace("vocab_embed.weight", "vocab_embed.embedding"): v for k, v in weights.items()}
        return {**renamed, f"{prefix}rotary_emb.inv_freq": torch.ones(4)}
    return weights


@pytest.fixture
def checkpoint(tmp_path):
    def write(name, config=None, weights=None):
        model = tiny(name)
        config = CHECKPOINTS[name] if config is None else config
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        named = theirs(name, dict(model.network.state_dict()) if weights is None else weights)
        items = list(named.items())
        for i, part in enumerate((items[::2], items[1::2])):  # in two files
            save_file({k: v.contiguous() for k, v in part}, tmp_path / f"model-{i}.safetensors")
        return model, tmp_path

    return write


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_in_its_own_format_loads(checkpoint, name):
    model, folder = checkpoint(name)
    loaded = dx.load_masked_language_model(folder)
    assert loaded.config.mask_token_id == MASK
    tokens = masked_tokens()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert loaded.config.shift_logits == (name == "dream")
    half = dx.load_masked_language_model(folder, dtype=torch.bfloat16)
    assert logits(half, tokens).dtype == torch.bfloat16


def test_tied_embeddings_are_loaded_and_saved(checkpoint, tmp_path):
    """The smaller public checkpoints have no output embeddings of their own, and diffusers saves no shared tensors."""
    weights = dict(tiny("dream").network.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.no_grad():
        whole = tiny("dream")
        whole.network.load_state_dict(weights)
    _, folder = checkpoint("dream", {**CHECKPOINTS["dream"], "tie_word_embeddings": True},
                           {k: v for k, v in weights.items() if k != "lm_head.weight"})  # fmt: skip
    loaded, tokens = dx.load_masked_language_model(folder), masked_tokens()
    assert torch.equal(logits(loaded, tokens), logits(whole, tokens))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits(dx.MaskedLanguageModel.from_pretrained(tmp_path / "saved"), tokens), logits(loaded, tokens)
    )


@pytest.mark.parametrize("time", GOLDEN["runs"])
def test_the_diffusion_transformer_equals_that_of_gidd(time):
    found = logits(tiny("gidd"), masked_tokens(), timesteps=torch.full((2,), float(time))).double().flatten()[::37]
    expected = torch.tensor(GOLDEN["runs"][time], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_settings_keep_their_meaning():
    """The base of the rotary angles is told by another name today; without it the angles would be others."""
    for name, base in (("llada", 500000.0), ("dream", 1000000.0), ("sdar", 1000000.0)):
        assert tiny(name).network.config.rope_parameters["rope_theta"] == base


def test_numbers_of_the_real_ones():
    """Shapes and masks of LLaDA 8B and Dream 7B, as their configurations say; nothing of that size is built."""
    llada = {
        **CHECKPOINTS["llada"], "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
        "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336,
    }  # fmt: skip
    dream = {
        **CHECKPOINTS["dream"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "mask_token_id": 151666,
    }  # fmt: skip
    mdlm = {**MDLM, "vocab_size": 50258, "hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
    expected = {"llada": (llada, 126336, 8.0e9), "dream": (dream, 151666, 7.6e9), "mdlm": (mdlm, 50257, 1.7e8)}
    for config, mask, size in expected.values():
        settings, _ = checkpoint_format(config)
        with torch.device("meta"):
            model = dx.MaskedLanguageModel(**settings)
        assert settings["mask_token_id"] == mask
        assert abs(sum(p.numel() for p in model.parameters()) / size - 1) < 0.05
    no_mask = {key: value for key, value in SDAR.items() if key != "mask_token_id"}
    assert checkpoint_format(no_mask)[0]["mask_token_id"] == 151669


def test_the_mask_may_stand_in_the_tokenizer(checkpoint):
    config = {key: value for key, value in CHECKPOINTS["gidd"].items() if key != "mask_token_id"}
    _, folder = checkpoint("gidd", config)
    with pytest.raises(ValueError, match="does not say which token is the mask"):
        dx.load_masked_language_model(folder)
    told = {"mask_token": "[MASK]", "added_tokens_decoder": {"48": {"content": "[PAD]"}, "49": {"content": "[MASK]"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    assert dx.load_masked_language_model(folder).config.mask_token_id == 49


def test_what_is_refused(checkpoint):
    model, folder = checkpoint("llada", {**CHECKPOINTS["llada"], "alibi": True})
    with pytest.raises(ValueError, match="has alibi = True; known is False"):
        dx.load_masked_language_model(folder)
    checkpoint("llada", {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="`model_type` 'gpt2'; known are LLaDA"):
        dx.load_masked_language_model(folder)
    weights = dict(model.network.state_dict())
    del weights["lm_head.weight"]
    checkpoint("llada", weights=weights)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        dx.load_masked_language_model(folder)
    with pytest.raises(ValueError, match="`architecture` is 'gpt'"):
        dx.MaskedLanguageModel("gpt")
    with pytest.raises(ValueError, match="only architecture 'dit' has a time"):
        dx.MaskedLanguageModel(time_conditioning=True)
    with pytest.raises(ValueError, match="not conditioned on time"):
        model(masked_tokens(), timesteps=torch.zeros(2))
    with pytest.raises(ValueError, match="`attention_mask` has shape"):
        model(masked_tokens(), attention_mask=torch.ones(2, 5))


def test_every_token_sees_its_block_and_those_before():
    model, tokens = tiny("sdar"), masked_tokens(1)
    before = logits(model, tokens)
    other = tokens.clone()
    other[:, 5] = 3
    changed = (logits(model, other) != before).any(-1)[0]
    assert not changed[:4].any() and changed[4:].all()
    for name in ("llada", "dream", "mdlm"):  # Dream predicts in place: what is at 5 reaches 0 as well
        model = tiny(name)
        assert (logits(model, tokens) != logits(model, other)).any(-1).all()


def test_gidd_is_told_the_time_or_takes_the_share_of_masks():
    model, tokens = tiny("gidd"), masked_tokens(1)
    share = torch.tensor([8 / 12])
    assert torch.equal(logits(model, tokens), logits(model, tokens, timesteps=share))
    assert not torch.equal(logits(model, tokens), logits(model, tokens, timesteps=share / 2))
