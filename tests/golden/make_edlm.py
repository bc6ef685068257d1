"""Make `edlm.json`: energies and a training loss of the authors' code, with networks given by formula.

    python -m tests.golden.make_edlm FOLDER_OF_THE_CLONE

Repository MinkaiXu/Energy-Diffusion-LLM, commit 97e3146, file diffusion.py: `EBM.ebm_forward` with the causal energy (all
positions, `ar_carry_over` false) and `EBM._forward_pass_diffusion` in training. Their sampler is not run: it weighs by
exp(+energy), and gives the energy probabilities where it takes log-probabilities.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from tests.golden._reference import functions
from tests.methods.test_edlm import (
    GOLDEN,
    VOCABULARY,
    golden_causal,
    golden_denoiser,
    golden_energy,
    golden_texts,
)

MASK = VOCABULARY - 1


def main(folder: str) -> None:
    scope = functions(Path(folder) / "diffusion.py", of_class="EBM")
    scope |= {"nn": nn, "F": F, "utils": SimpleNamespace(print_nans=lambda *_: None)}
    text, u, t = golden_texts()
    noisy = torch.where(u < t[:, None], MASK, text)
    network = SimpleNamespace(
        vocab_embed=lambda ids: ids,
        rotary_emb=lambda x: None,
        blocks=[],
        output_layer=lambda ids, _: golden_causal(ids),
    )
    model = SimpleNamespace(
        config=SimpleNamespace(ebm_backbone="ar", sampling=SimpleNamespace(ar_carry_over=False)),
        ebm=network, parameterization="subs", mask_index=MASK, neg_infinity=-1e6,
        _process_sigma=lambda sigma: sigma,
        _maybe_sub_sample=lambda ids, mask: (ids[:, :-1], ids[:, 1:], mask[:, 1:]),
    )  # fmt: skip
    energies = scope["ebm_forward"](model, noisy, None, x0=text, log_p_x0=golden_denoiser(noisy))
    scope["_sample_categorical"] = lambda p, num_samples: p.argmax(-1)  # the denoiser is as good as certain
    trained = SimpleNamespace(
        _sample_t=lambda n, device: t, T=0, change_of_variables=False, noise=lambda t: (-torch.log1p(-t), None),
        q_xt=lambda x, chance: torch.where(u < chance, MASK, x), forward=lambda xt, _: golden_denoiser(xt),
        ebm_forward=lambda xt, _, x0, *rest: golden_energy(x0, xt)[:, None], parameterization="subs",
    )  # fmt: skip
    losses = scope["_forward_pass_diffusion"](trained, text, torch.ones_like(text), prefix="train")
    source = {
        "repository": "https://github.com/MinkaiXu/Energy-Diffusion-LLM",
        "commit": "97e3146964f76aaa784fe523c673516efc7af0e0",
        "file": "diffusion.py",
        "how": "python -m tests.golden.make_edlm: four texts of 6 tokens, networks by formula",
    }
    found = {"energies": energies.squeeze(1).double().tolist(), "loss": losses.mean().item()}
    GOLDEN.write_text(json.dumps({"source": source, **found}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
