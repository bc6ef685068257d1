"""Make `paradigms.json`: latents and numbers of passes of the authors' pipeline, on a tiny U-Net of formula weights.

    python -m tests.golden.make_paradigms FOLDER_OF_THE_CLONE

Repository AndyShih12/paradigms, files paradigms/stablediffusion_paradigms.py (the loop), paraddim_scheduler.py and
paraddpm_scheduler.py. What the loop asks of a pipeline of early diffusers, and of CUDA events for its clock, is given below;
it draws the noise of all steps before the first, from torch's global generator.
"""

import importlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from tests.methods.test_paradigms import GOLDEN, GOLDEN_RUNS, draw_golden, golden_scheduler, stable_diffusion


class _Clock:
    def __init__(self, **options):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 0.0


class _OldPipeline:
    """The few methods of a pipeline that their loop calls."""

    _execution_device, vae_scale_factor = torch.device("cpu"), 1

    def __init__(self, loop, unet, scheduler):
        self.loop, self.scheduler, self.passes = loop, scheduler, 0

        def called(*args, **kwargs):
            self.passes += 1
            return unet(*args, **kwargs)

        self.wrapped_unet = called
        self.unet = type("UNet", (), {"in_channels": 4, "config": unet.config, "__call__": staticmethod(called)})()

    def __call__(self, **call):
        return self.loop(self, **call)

    def set_progress_bar_config(self, **options):
        pass

    def check_inputs(self, *args):
        pass

    def _encode_prompt(self, *args, prompt_embeds, negative_prompt_embeds):
        return torch.cat([negative_prompt_embeds, prompt_embeds])

    def prepare_latents(self, *args):
        return args[-1]

    def prepare_extra_step_kwargs(self, generator, eta):
        return {"generator": generator}


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    loop = importlib.import_module("paradigms.stablediffusion_paradigms").paradigms_forward
    kinds = {
        "DDIM": importlib.import_module("paradigms.paraddim_scheduler").ParaDDIMScheduler,
        "DDPM": importlib.import_module("paradigms.paraddpm_scheduler").ParaDDPMScheduler,
    }
    torch.cuda.Event, torch.cuda.synchronize = _Clock, lambda: None
    unet, runs = stable_diffusion().to(torch.float64).unet, {}
    for run, (kind, parallel, tolerance) in GOLDEN_RUNS.items():
        scheduler = kinds[kind].from_config(golden_scheduler(kind).config)
        scheduler._is_ode_scheduler = kind == "DDIM"
        pipe = _OldPipeline(loop, unet, scheduler)
        torch.manual_seed(0)
        with redirect_stdout(io.StringIO()):
            latents = draw_golden(pipe, parallel=parallel, tolerance=tolerance)
        first = latents.flatten(1)[:, :8].tolist()
        runs[run] = {"passes": pipe.passes, "std": latents.std().item(), "latents": first}
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    source = {
        "repository": "https://github.com/AndyShih12/paradigms",
        "commit": commit.stdout.strip(),
        "file": "paradigms/stablediffusion_paradigms.py",
        "how": "python -m tests.golden.make_paradigms FOLDER: 20 steps of two guided pictures in float64",
    }
    GOLDEN.write_text(json.dumps({"source": source, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
