"""Make `harmonica.json`: outputs, losses and gradients of the authors' router on weights and inputs given by formula.

    python -m tests.golden.make_harmonica FOLDER_OF_THE_CLONE

Repository ModelTC/HarmoniCa, file models/router_models.py, class DiT with its routers, and the loss of train_router.py. Its
layers from timm are written here with torch, and timesteps are embedded as diffusers does it, whose frequencies differ a
little. The calls follow train_router.py: the first step of a run, then at each step the model without and with the router.
The cache is empty before, where their loop keeps that of the run before; guidance is left out, which both sides apply to what
the model gives.
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from tests.methods.test_harmonica import (
    GOLDEN_BETA,
    GOLDEN_LAMBDA,
    TIMES,
    golden_dit,
    golden_inputs,
    golden_logits,
    golden_numbers,
)


class PatchEmbed(nn.Module):
    def __init__(self, size, patch, channels, width, bias=True):
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width, num_heads, qkv_bias=True):
        super().__init__()
        self.heads, self.qkv, self.proj = num_heads, nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def weights_of_theirs(ours: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a diffusers DiT by the names of the authors' model."""
    state, moved = ours.state_dict(), {}
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(len(ours.transformer_blocks)):
        block = f"transformer_blocks.{i}"
        names |= {
            f"blocks.{i}.adaLN_modulation.1": f"{block}.norm1.linear", f"blocks.{i}.attn.proj": f"{block}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"{block}.ff.net.0.proj", f"blocks.{i}.mlp.fc2": f"{block}.ff.net.2",
        }  # fmt: skip
        for kind in ("weight", "bias"):
            parts = [state[f"{block}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            moved[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for theirs, mine in names.items():
        for kind in ("weight", "bias"):
            moved[f"{theirs}.{kind}"] = state[f"{mine}.{kind}"]
    moved["y_embedder.embedding_table.weight"] = state[
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]
    return moved


def main(folder: Path) -> None:
    timm = types.ModuleType("timm.models.vision_transformer")
    vars(timm).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.vision_transformer"] = timm
    spec = importlib.util.spec_from_file_location("router_models", folder / "models" / "router_models.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    reference.TimestepEmbedder.timestep_embedding = staticmethod(
        lambda t, dim, max_period=10000: get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=1)
    )
    model = reference.DiT(input_size=8, patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=10).eval()
    missing = model.load_state_dict(weights_of_theirs(golden_dit()), strict=False)
    assert missing.missing_keys == ["pos_embed"] and not missing.unexpected_keys, missing
    model.add_router(4, TIMES)
    for index, row in zip((3, 2, 1, 0), golden_logits(), strict=True):
        model.routers[index].prob.data.copy_(row)
    x, t, y = golden_inputs(0)
    steps = [{"full": golden_numbers(model.forward_(x, t, y, thres=0.1))}]
    for step in (1, 2, 3):
        x, t, y = golden_inputs(step)
        full = model.forward_(x, t, y, thres=0.1, fix_reuse_feature=True, activate_router=False)
        mixed, used = model.forward_(x, t, y, thres=0.1, fix_reuse_feature=False, activate_router=True)
        loss = ((full - mixed) ** 2).mean(dim=(1, 2, 3)).mean() * GOLDEN_LAMBDA + GOLDEN_BETA * used.mean()
        (gradient,) = torch.autograd.grad(loss, model.routers[3 - step].prob)
        steps.append({
            "full": golden_numbers(full), "mixed": golden_numbers(mixed), "loss": [loss.item()],
            "gradient": gradient.tolist(),
        })  # fmt: skip
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    source = {
        "repository": "https://github.com/ModelTC/HarmoniCa",
        "commit": commit.stdout.strip(),
        "file": "models/router_models.py",
        "how": "python -m tests.golden.make_harmonica FOLDER: per call the mean, the standard deviation and the first three "
        "values of the model's output; per step with the router the loss and its gradient by p",
    }
    Path(__file__).with_name("harmonica.json").write_text(
        json.dumps({"source": source, "steps": steps}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
