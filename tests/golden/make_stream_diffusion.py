"""Make `stream_diffusion.json`: numbers of the authors' stream and filter, on weights, latents and noise given by formula.

    python -m tests.golden.make_stream_diffusion FOLDER_OF_THE_CLONE

Repository cumulo-autumn/StreamDiffusion, commit b623251, files src/streamdiffusion/pipeline.py and image_filter.py, as they
are. Latents go in behind their autoencoder and come out before it; text embeddings are given.
"""

import importlib
import json
import random
import sys
import types
from pathlib import Path

import torch

from tests.methods.test_stream_diffusion import (
    DELTA,
    GAMMA,
    GOLDEN,
    GOLDEN_FRAMES,
    RUNS,
    embeds,
    golden_frame,
    golden_movie,
    tiny,
    wave,
)

MAX_SKIP = 4


def load(folder: str) -> tuple:
    """Their two modules, without the package around them, which needs TensorRT and more."""
    package = types.ModuleType("streamdiffusion")
    package.__path__ = [str(Path(folder, "src", "streamdiffusion"))]
    sys.modules["streamdiffusion"] = package
    return tuple(importlib.import_module(f"streamdiffusion.{name}") for name in ("pipeline", "image_filter"))


def main(folder: str) -> None:
    pipeline, image_filter = load(folder)
    runs = {}
    for run, (cfg_type, places, add_noise) in RUNS.items():
        ours = tiny()
        pipe = types.SimpleNamespace(
            device=torch.device("cpu"),
            vae_scale_factor=1,
            scheduler=ours.scheduler,
            text_encoder=None,
            unet=ours.unet,
            vae=None,
            encode_prompt=lambda **_: (embeds(0), embeds(0.5)),
        )
        theirs = pipeline.StreamDiffusion(
            pipe, list(places), torch.float64, 8, 8, do_add_noise=add_noise, cfg_type=cfg_type
        )
        theirs.prepare("", guidance_scale=GAMMA, delta=DELTA, generator=torch.Generator())
        theirs.init_noise = wave(len(places), 4, 8, 8)
        outputs = []
        with torch.no_grad():
            for k in range(GOLDEN_FRAMES):
                x = theirs.add_noise(golden_frame(k)[None], theirs.init_noise[0], 0)
                outputs.append(theirs.predict_x0_batch(x)[0, :, :2, :2].flatten().tolist())
        runs[run] = outputs[len(places) - 1 :]

    generator = random.Random(0)
    draws: list[float] = []
    image_filter.random = types.SimpleNamespace(uniform=lambda *_: draws.append(generator.random()) or draws[-1])
    gate = image_filter.SimilarImageFilter(0.98, MAX_SKIP)
    skipped = [gate(frame) is None for frame in golden_movie()]
    source = {
        "repository": "https://github.com/cumulo-autumn/StreamDiffusion",
        "commit": "b623251dc055e1fd858d53509aa43e09dfc5cdc0",
        "files": ["src/streamdiffusion/pipeline.py", "src/streamdiffusion/image_filter.py"],
        "how": "python -m tests.golden.make_stream_diffusion: float64; of every latent that leaves, 2 x 2 of each channel",
    }
    content = {"source": source, "runs": runs, "filter": {"max_skip": MAX_SKIP, "draws": draws, "skipped": skipped}}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
