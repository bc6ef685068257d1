"""Split the avatars by caption into `generator`, `judge` and `reference`, and write `avatars_splits.json`.

Pictures that share a caption stay together, so that a caption of the reference split is unseen by the generator and
by the judge. The file is committed; this script documents how it was made and reproduces it byte for byte.

    python benchmarks/data/make_splits.py
"""

import json
from pathlib import Path

import numpy as np

SHARES = {"generator": 0.70, "judge": 0.20, "reference": 0.10}


def main() -> None:
    here = Path(__file__).parent
    captions = np.load(here / "avatars.npz")["caption"]
    unique = np.unique(captions)
    order = np.random.default_rng(0).permutation(len(unique))
    bounds = np.round(np.cumsum([0.0, *SHARES.values()]) * len(unique)).astype(int)
    splits = {}
    for name, start, stop in zip(SHARES, bounds[:-1], bounds[1:], strict=True):
        splits[name] = np.flatnonzero(np.isin(captions, unique[order[start:stop]])).tolist()
    (here / "avatars_splits.json").write_text(json.dumps(splits) + "\n")
    print({name: len(indices) for name, indices in splits.items()})


if __name__ == "__main__":
    main()
