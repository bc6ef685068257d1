"""Load any diffusers pipeline together with what its repository says is on: methods, LoRA files, classes of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import _compat, _loras
from . import recipe as recipes
from ._export import CLASSES_KEY
from .registry import LAZY_NAMES, load_entry

_PACKAGE = "diffusers_ext"
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


class Pipeline:
    """Loads pipelines. It is not a pipeline itself: what it returns is the ordinary diffusers pipeline."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, skip_unknown: bool = False, **kwargs: Any
    ) -> Any:
        """Load a pipeline as `DiffusionPipeline.from_pretrained` does, then put on what its recipe lists.

        The recipe is checked before any weights are loaded. Classes of this package come from the installed package: no
        `trust_remote_code` is needed for them, and `isinstance` holds.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            skip_unknown: leave out, with a warning, methods that this installation does not have.
            kwargs: every argument of `DiffusionPipeline.from_pretrained`: `revision`, `token`, `cache_dir`, `dtype`,
                `variant`, `local_files_only`, components such as `scheduler`, and the rest.

        Returns:
            A pipeline of the class that the repository names, for example `StableDiffusionPipeline`.

        Raises:
            ValueError: the recipe is malformed, needs a newer diffusers_ext or a method that is not installed.
            EnvironmentError: there is no such repository or folder, or it has no `model_index.json`.
        """
        from diffusers import DiffusionPipeline

        path = str(pretrained_model_name_or_path)
        download = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if kwargs.get(name) is not None}
        index, commit = DiffusionPipeline.load_config(
            path, return_commit_hash=True, revision=kwargs.get("revision"), **download
        )
        recipe = index.get(recipes.RECIPE_KEY)
        loras = []
        if recipe is not None:
            recipes.validate(recipe, skip_unknown)
            loras = _loras.validate(recipe.get(_loras.KEY, []))
        if commit is not None:  # the weights of the commit whose recipe was checked
            kwargs["revision"] = commit
        files = _lora_files(path, loras, commit, download)
        pipe = _loader(index).from_pretrained(path, **kwargs)
        _loras.load(pipe, loras, files)
        return pipe if recipe is None else recipes.apply(pipe, recipe, skip_unknown)


def _lora_files(
    path: str, loras: list[dict[str, Any]], commit: str | None, download: dict[str, Any]
) -> dict[str, Path]:
    """Local place of each LoRA file, downloaded where needed: stock loading leaves them alone."""
    from huggingface_hub import hf_hub_download

    files = {}
    for name in (row["file"] for row in loras):
        if os.path.isdir(path):
            files[name] = Path(path, name)
            if not files[name].is_file():
                raise OSError(f"The recipe of {path!r} lists {name!r}, and there is no such file.")
        else:
            files[name] = Path(hf_hub_download(path, name, revision=commit, **download))
    return files


def _loader(index: dict[str, Any]) -> Any:
    """A `DiffusionPipeline` that reads our classes in a `model_index.json` as those of the installed package.

    Stock loading takes an entry `[file, class]` for code to run from the repository: entries of ours are turned into
    `["diffusers_ext", class]` where the index is read.
    """

    def read(file: str | os.PathLike) -> dict[str, Any]:
        return _with_installed_classes(json.loads(Path(file).read_text(encoding="utf-8")))

    ours = isinstance(index.get("_class_name"), list) and isinstance(_with_installed_classes(index)["_class_name"], str)
    return _compat.pipeline_reading(read, _PACKAGE if ours else "diffusers")


def _with_installed_classes(index: dict[str, Any]) -> dict[str, Any]:
    """The index with entries of our exported files turned into entries of the installed package.

    A class that this installation does not have stays an entry of the repository's file, for which diffusers asks for
    `trust_remote_code`.

    Raises:
        ValueError: the index contradicts itself about one of our classes.
    """
    classes = index.get(CLASSES_KEY, {})
    if not isinstance(classes, dict):
        raise ValueError(f"`{CLASSES_KEY}` of the index is {classes!r}; it must be an object.")
    result = dict(index)
    for name, class_name in classes.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != class_name:
            raise ValueError(f"The index says that {name!r} is {entry!r} and that its class is {class_name!r}.")
        if _is_installed(class_name):
            result[name] = class_name if name == "_class_name" else [_PACKAGE, class_name]
    return result


def _is_installed(name: Any) -> bool:
    """Whether `name` is a public class of this package that diffusers can load; nothing else is ever imported."""
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
    from diffusers.guiders import BaseGuidance

    if not isinstance(name, str) or name not in LAZY_NAMES:
        return False
    found = load_entry(name)
    return isinstance(found, type) and issubclass(found, (DiffusionPipeline, ModelMixin, SchedulerMixin, BaseGuidance))
