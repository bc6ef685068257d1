"""Make `diffusion_bert.json`: survival probabilities and losses of the authors' code, with a network given by formula.

    python -m tests.golden.make_diffusion_bert FOLDER_OF_THE_CLONE

Repository Hzfinfdu/Diffusion-BERT, commit 19d7f49, file diffusion_word_freq.py: `MaskDiffusion.get_qt_given_q0` with the
spindle schedule, and `compute_kl_reverse_process` without it (with it, their posterior keeps the plain schedule's rate).
Packages that the file only names are left out.
"""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from tests.methods.test_diffusion_bert import GOLDEN, MASK, STEPS, VOCABULARY, golden_inputs, golden_logits


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    file = Path(folder) / "diffusion_word_freq.py"
    text = re.sub(r"^(import fastNLP|from transformers import .*)$", "", file.read_text(), flags=re.MULTILINE)
    theirs = ModuleType("diffusion_word_freq")
    sys.modules[theirs.__name__] = theirs  # where its dataclasses look
    exec(compile(text, str(file), "exec"), theirs.__dict__)
    ids, u, counts = golden_inputs()
    values = torch.log(counts + 1.0)  # as their DDP_main.py does it
    values = values / values.max()
    centred = torch.stack([values[row] - values[row].mean() for row in ids])
    schedule = theirs.create_discrete_diffusion_schedule("mutual", num_steps=STEPS)

    def diffusion(lam: float) -> object:
        return theirs.MaskDiffusion(
            dim=VOCABULARY, schedule=schedule, tokenizer=SimpleNamespace(mask_token_id=MASK), word_freq_lambda=lam,
            sample_cls=SimpleNamespace(sample=lambda logits, x: noisy), device="cpu",
        )  # fmt: skip

    alive = {}
    for k in (1, 4, 8, 13, 15):
        found = diffusion(0.3).get_qt_given_q0(
            ids, torch.tensor([k]), make_one_hot=True, word_freq_logits=centred.double()
        )
        alive[str(k)] = found.gather(-1, ids[..., None]).squeeze(-1).tolist()
    losses = {}
    for k in (1, 2, 9, 16):
        noisy = torch.where(u >= 1 - k / STEPS, MASK, ids)
        losses[str(k)] = theirs.compute_kl_reverse_process(
            ids, torch.tensor([k - 1]), diffusion=diffusion(0.0), hybrid_lambda=0.01, word_freq_logits=centred,
            denoise_fn=lambda targets, timestep, attention_mask: golden_logits(targets),
        )["loss"].item()  # fmt: skip
    source = {
        "repository": "https://github.com/Hzfinfdu/Diffusion-BERT",
        "commit": "19d7f494f6eab7f104098873095871d172a879b6",
        "file": "diffusion_word_freq.py",
        "how": "python -m tests.golden.make_diffusion_bert: three texts of 6 tokens, 16 steps, network by formula",
    }
    GOLDEN.write_text(json.dumps({"source": source, "survival": alive, "losses": losses}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
