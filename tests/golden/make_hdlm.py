"""Make `hdlm.json`: texts, losses and tables of the authors' code, with networks and uniform numbers given by formula.

    python -m tests.golden.make_hdlm FOLDER_OF_THE_CLONE

Repository ServiceNow/hdlm, commit 3bd7829, files hdlm/epsilon_hybrid/sample.py (`full_diff` with the correction sampler, at
temperature 0), hdlm/epsilon_hybrid/losses.py (`get_loss_fn_hybrid`), hdlm/metaschedule.py and hdlm/metaschedule_utils.py.
Their devices, written out as 'cuda', are read as 'cpu'.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests.golden._reference import functions
from tests.methods.test_hdlm import GOLDEN, RUNS, TABLES, golden_noise
from tests.methods.test_radd import LENGTH, ROWS, VOCABULARY, golden_logits, golden_uniform

MASK = VOCABULARY - 1


def on_cpu(file: Path) -> dict:
    """The functions of a file that names a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_text(file.read_text().replace("'cuda'", "'cpu'"))
        return functions(copy)


def texts(folder: Path) -> dict[str, list]:
    scope, plain, runs = on_cpu(folder / "hdlm" / "epsilon_hybrid" / "sample.py"), torch.rand_like, {}
    for run, (eta, steps) in RUNS.items():
        numbers = iter(range(10**6))

        def draw(x, **_):
            if x.shape != (ROWS, LENGTH):
                return torch.full(x.shape, 0.5, dtype=torch.float64)  # to the power of 0
            now = next(numbers)  # noqa: B023
            return torch.stack([golden_uniform(row, now) for row in range(ROWS)])

        torch.rand_like = draw
        result = scope["full_diff"](
            lambda x, positions: golden_logits(x), batch_size=ROWS, alg="acs", steps=steps, temperature=0.0, eta=eta,
            context_length=LENGTH, dim=MASK, device="cpu",
        )  # fmt: skip
        torch.rand_like = plain
        runs[run] = result.tolist()
    return runs


def losses(folder: Path) -> dict[str, float]:
    scope, found = on_cpu(folder / "hdlm" / "epsilon_hybrid" / "losses.py"), {}
    scope["CrossEntropyLoss"] = nn.CrossEntropyLoss
    t, u, v, tokens, ids = golden_noise()
    plain = torch.rand, torch.randint
    for epsilon, weight in ((0.01, 1.0), (0.3, 1.0), (0.3, 0.5), (0.0, 1.0)):
        numbers = iter((t, u, v))
        wrong = (v < epsilon) & (u >= ((1 - 1e-4) * t + 1e-4)[:, None])
        torch.rand, torch.randint = lambda *_, **__: next(numbers), lambda *_, **__: tokens[wrong]  # noqa: B023

        class Model:
            train = eval = staticmethod(lambda: None)

            def __call__(self, x, positions):
                return golden_logits(x).float()

        loss = scope["get_loss_fn_hybrid"](True, mask_index=MASK, epsilon=epsilon, lamb=weight)
        value = loss(Model(), {"input_ids": ids, "positions": None})
        torch.rand, torch.randint = plain
        found[f"{epsilon} {weight}"] = value.item()
    return found


def tables(folder: Path) -> tuple[dict[str, list], dict[str, list]]:
    spec = importlib.util.spec_from_file_location("metaschedule", folder / "hdlm" / "metaschedule.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    levels, rates = {}, {}
    for name, (kind, width, count, length) in TABLES.items():
        made = (module.make_block_annealing if kind == "block" else module.make_simple_annealing)(width, count)
        levels[name] = [list(made(step)(stop=length)) for step in range(1, made.max_step(length))]
    scope = on_cpu(folder / "hdlm" / "metaschedule_utils.py")
    for count in (3, 8):
        made = module.make_block_annealing(1, count)  # the first place goes through all levels, the second waits
        steps = [
            scope["compute_t_and_attn"](1, 2, made, step, device="cpu")[0].tolist() for step in range(1, count + 1)
        ]
        rates[str(count)] = [step[0] for step in reversed(steps)] + [steps[0][1]]
    return levels, rates


def main(folder: str) -> None:
    levels, rates = tables(Path(folder))
    source = {
        "repository": "https://github.com/ServiceNow/hdlm",
        "commit": "3bd78298f906947370857165e62e69515aa8c302",
        "file": "hdlm/epsilon_hybrid/sample.py and losses.py, hdlm/metaschedule.py, hdlm/metaschedule_utils.py",
        "how": "python -m tests.golden.make_hdlm: three rows of 8 tokens, network and uniform numbers by formula",
    }
    found = {"runs": texts(Path(folder)), "losses": losses(Path(folder)), "levels": levels, "rates": rates}
    GOLDEN.write_text(json.dumps({"source": source, **found}, indent=1))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
