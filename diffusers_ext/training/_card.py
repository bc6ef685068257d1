"""The card of a trained model: what it is, how to load it, and the settings that made it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cards import card_text, render, table

# Where things lie on one machine, and what says nothing about the result.
_LOCAL = {"output_dir", "logging_dir", "cache_dir", "hub_token", "push_to_hub", "report_to", "dataloader_num_workers",
          "resume_from_checkpoint", "checkpoints_total_limit", "checkpointing_steps", "validation_prompts"}  # fmt: skip


def training_card(
    args: argparse.Namespace,
    script: str,
    class_name: str,
    summary: dict[str, Any],
    tags: list[str],
    library: str = "diffusers",
    loading: str | None = None,
) -> str:
    """Markdown with metadata; names of local files are shortened to their last part.

    Args:
        args: arguments of the script.
        script: name of the script's module, such as `train_text_to_image`.
        class_name: class that loads the result.
        summary: what `train` returned: optimizer steps, seconds, processes.
        tags: for the Hub.
        library: the package that has the class.
        loading: Python code that loads and uses it; None for `from_pretrained` of the class.
    """
    repo_id = args.hub_model_id or "path/to/this/folder"
    data: dict[str, Any] = {"library_name": library, "tags": ["diffusers_ext", "diffusers-training", *tags]}
    base = args.pretrained_model_name_or_path
    if not Path(base).exists():
        data["base_model"] = base
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        data["datasets"] = [args.dataset_name]
    rows = []
    for name, value in sorted(vars(args).items()):
        if value is None or value is False or name in _LOCAL:
            continue
        rows.append([f"`--{name}`", Path(str(value)).name if Path(str(value)).exists() else value])
    rows += [["optimizer steps", summary["steps"]], ["processes", summary["processes"]]]
    code = f"from {library} import {class_name}\n\nmodel = {class_name}.from_pretrained({repo_id!r})"
    picture = sorted(Path(args.output_dir, "samples").glob("step-*.png"))
    body = render(
        "_training",
        title=repo_id.rpartition("/")[2] if args.hub_model_id else class_name,
        what=f"A `{class_name}` trained with `diffusers_ext.training.{script}`.",
        samples=f"![samples](samples/{picture[-1].name})" if picture else "",
        loading=f"```python\n{code if loading is None else loading}\n```",
        settings=table(["setting", "value"], rows),
    )
    return card_text(data, body)
