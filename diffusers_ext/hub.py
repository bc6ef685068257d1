"""Save and share pipelines: self-contained folders and Hub repositories, with what is on, LoRA files and a card."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from torch import nn

from . import _compat, _loras
from . import recipe as recipes
from ._export import CLASSES_KEY, export_class
from .cards import MARKER, PLACE, pipeline_card

INDEX = "model_index.json"
CARD = "README.md"
_PACKAGE = "diffusers_ext"

# Never uploaded: what a training run keeps to go on, what is being written, and files that run code when opened.
NEVER_UPLOADED = (
    "checkpoint-*", "*/checkpoint-*", ".partial-*", "*/.partial-*", "logs/*", ".git/*", ".cache/*",
    "*.bin", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt",
)  # fmt: skip
_PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")
_TEXTS = (".json", ".jsonl", ".md", ".py", ".txt", ".toml", ".yaml", ".yml", ".jinja", ".cfg")
# Word lists of tokenizers: their entries may look like anything, and no path of this machine gets into them.
_WORD_LISTS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# Where tokenizers of some versions keep a file's name, or its place on the machine of whoever saved it last.
_PLACE_KEYS = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file")
_LOCAL_PATH = (
    r"(?<![\w.:/~-])(?:{here}|/(?:home|Users|root|tmp|mnt|media|data|work|workspace|content|scratch|opt|srv|var|Volumes))/[^\s\"'`<>|)]+"
    r"|(?<!\w)[A-Za-z]:\\(?:Users|home|tmp|temp|data|work)\\[^\s\"'`<>|]+"
)
# Weights of a model as diffusers and transformers name them, whole or in shards, with the list of the shards.
_WEIGHTS = (
    r"(?:diffusion_pytorch_model|model)"
    r"(?:{variant}(?:-\d{{5}}-of-\d{{5}})?\.safetensors|\.safetensors\.index{variant}\.json)"
)


def save_pretrained(
    pipe: Any,
    folder: str | os.PathLike,
    card: bool = True,
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a pipeline with all that is on, so that it loads for people without this package as well.

    The folder is an ordinary pipeline folder. Beside what stock `save_pretrained` writes, it holds the recipe of what
    is enabled, one self-contained file for each class of ours (stock diffusers runs it under `trust_remote_code=True`),
    each LoRA adapter as a standard file, and a card. `Pipeline.from_pretrained` brings all of it back. The pipeline in
    memory stays as it is.

    The folder is written aside and put in place when it is complete. Files of others in it stay; of a pipeline that was
    saved there before, what belongs to it is replaced. A card that somebody wrote stays.

    Args:
        pipe: a `DiffusionPipeline`.
        folder: where to save; created where it does not exist.
        card: write `README.md`.
        variant: as in stock `save_pretrained`, for example "fp16": part of the names of the weight files.
        max_shard_size: as in stock `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: something of the pipeline would be lost or would not load again: a fused LoRA, an adapter that is
            not a LoRA, offloaded weights, a component that cannot be saved, a class of ours that cannot stand alone; or
            a file to be written holds a path of this machine.
    """
    asked, folder = Path(folder), Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` is {str(asked)!r}, which is a file.")
    _check(pipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".partial-{folder.name}-") as aside:
        new = Path(aside) / "pipeline"
        _write(pipe, new, variant, max_shard_size)
        if card and (not (folder / CARD).exists() or _is_ours((folder / CARD).read_bytes())):
            _write_card(pipe, new, None)
        _refuse_leaks(new)
        _put_in_place(new, folder, variant)
    return asked


def push_to_hub(
    pipe: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> CommitInfo:
    """Save a pipeline as `save_pretrained` does and put it on the Hub, in one commit.

    Nothing is created on the Hub before the pipeline is saved. A card that somebody wrote in the repository stays.

    Args:
        pipe: a `DiffusionPipeline`.
        repo_id: `user/name`; created where it does not exist.
        private: whether a new repository is private; None takes the account's setting.
        revision: branch to commit to, created where it does not exist; None is the main branch.
        token: access token; None takes the one that is logged in.
        commit_message: None says what was uploaded.
        create_pr: open a pull request instead of committing to the branch.
        variant, max_shard_size: see `save_pretrained`.

    Raises:
        ValueError: `repo_id` is no name of a repository, or see `save_pretrained`.
    """
    validate_repo_id(repo_id)
    _check(pipe)
    with tempfile.TemporaryDirectory(prefix="diffusers_ext-") as aside:
        new = Path(aside) / "pipeline"
        _write(pipe, new, variant, max_shard_size)
        if "/" not in repo_id:
            repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        _write_card(pipe, new, repo_id)
        _refuse_leaks(new)
        return upload_folder(
            new, repo_id, token=token, private=private, revision=revision, create_pr=create_pr, variant=variant,
            commit_message=commit_message or f"Upload {type(pipe).__name__}",
        )  # fmt: skip


def upload_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
) -> CommitInfo:
    """Put a folder on the Hub in one commit, for example the output of a training script.

    Left out are training checkpoints (`checkpoint-*`), what is half written (`.partial-*`), `logs`, and pickles. The
    key `_name_or_path`, which diffusers fills with a path of this machine, is taken out of what is uploaded. Of a
    pipeline that was in the repository before, files that belong to it and not to the new one are deleted.

    Args:
        folder: what to upload. It is not changed.
        repo_id, token, private, revision, create_pr, variant: see `push_to_hub`.
        commit_message: None says what was uploaded.

    Raises:
        ValueError: `folder` is no folder or has nothing to upload, `repo_id` is no name of a repository, or a text file
            holds a path of this machine.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, which is not a folder.")
    contents = upload_contents(folder)
    if not contents:
        raise ValueError(f"`folder` is {str(folder)!r}, which holds nothing to upload.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision)
    remote = set(api.list_repo_files(repo_id, revision=revision))
    if CARD in contents and _is_ours(card := _bytes(contents[CARD])):
        contents[CARD] = card.replace(PLACE.encode(), repo_id.encode())
        if CARD in remote and not _is_ours(_download(api, repo_id, CARD, revision)):
            del contents[CARD]
    stale: set[str] = set()
    if INDEX in contents and INDEX in remote:
        old = json.loads(_download(api, repo_id, INDEX, revision))
        stale = _stale(remote, old, set(contents), variant)
    operations = [
        *(CommitOperationAdd(name, content) for name, content in contents.items()),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or f"Upload {folder.name}",
        revision=revision,
        create_pr=create_pr,
    )


def describe(source: Any) -> tuple[dict[str, Any], str | None]:
    """What a card says of a pipeline or of a saved folder: its index, and where it is from (a folder or a repository).

    Raises:
        ValueError: `source` is a folder without `model_index.json`, or a pipeline that `save_pretrained` refuses.
    """
    if isinstance(source, (str, os.PathLike)):
        file = Path(source) / INDEX
        if not file.is_file():
            raise ValueError(f"`source` is {str(source)!r}, which has no {INDEX}.")
        return json.loads(file.read_text(encoding="utf-8")), str(source)
    _check(source)
    origin = source.config.get("_name_or_path")
    index = {"_class_name": type(source).__name__, **_private_keys(source, _loras.rows(source))}
    return index, None if origin is None else str(origin)


# --- what is written -------------------------------------------------------------------------------------------------


def _check(pipe: Any) -> None:
    """Refuse, before any work, what would be lost or would not load again."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"`pipe` is {type(pipe).__name__}; a DiffusionPipeline is needed.")
    for name, part in {**pipe.components, "_class_name": pipe}.items():
        if type(_compat.unwrap(part)).__module__.startswith("diffusers_modules."):
            what = "the pipeline" if part is pipe else f"`{name}`"
            raise ValueError(
                f"{type(part).__name__}, the class of {what}, was loaded with `trust_remote_code` and would lose its "
                f"code. Load the pipeline with `{_PACKAGE}.Pipeline.from_pretrained`, which takes the installed class, "
                "then save."
            )
        if not isinstance(part, nn.Module):
            continue
        if any(tensor.is_meta for tensor in part.parameters()):
            raise ValueError(
                f"`{name}` is offloaded, so its weights are not at hand. Call `pipe.remove_all_hooks()`, then save."
            )
        if getattr(getattr(part, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
            raise ValueError(
                f"`{name}` has an IP-Adapter, which a pipeline folder cannot hold. Call `pipe.unload_ip_adapter()`."
            )
    _loras.check(pipe)


def _write(pipe: Any, folder: Path, variant: str | None, max_shard_size: int | str | None) -> None:
    """Write all files of a pipeline but the card into a new folder."""
    loras = _loras.rows(pipe)
    _loras.save(pipe, folder, loras)
    config = dict(pipe.config)  # stock `save_pretrained` strikes a part that it cannot save out of it
    try:
        with _loras.base_models(pipe):
            pipe.save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
    finally:
        pipe.register_to_config(**config)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name, part in pipe.components.items():
        if part is not None and (index.get(name, [None])[0] is None or not (folder / name).is_dir()):
            raise ValueError(
                f"`{name}` is {type(part).__name__}, which diffusers cannot save as part of a {type(pipe).__name__}."
            )
    index.pop(recipes.RECIPE_KEY, None)
    index |= _private_keys(pipe, loras)
    for name, cls in _our_classes(pipe).items():
        exported = export_class(cls)
        index[name] = [exported.stem, exported.class_name]
        place = folder if name == "_class_name" else folder / name
        (place / f"{exported.stem}.py").write_text(exported.source, encoding="utf-8")
    _write_json(folder / INDEX, index)
    for file in folder.rglob("*.json"):
        if file.name not in _WORD_LISTS:
            cleaned = _without_origin(content := json.loads(file.read_text(encoding="utf-8")))
            if cleaned != content:
                _write_json(file, cleaned)


def _private_keys(pipe: Any, loras: list[dict[str, Any]]) -> dict[str, Any]:
    """What the index of `pipe` holds beside what diffusers writes."""
    keys: dict[str, Any] = {}
    recipe = recipes.collect(pipe)
    if loras:
        recipe = {**(recipe or {"schema": recipes.SCHEMA, "methods": []}), _loras.KEY: loras}
    if recipe is not None:
        keys[recipes.RECIPE_KEY] = recipe
    if classes := _our_classes(pipe):
        keys[CLASSES_KEY] = {name: cls.__name__ for name, cls in classes.items()}
    return keys


def _our_classes(pipe: Any) -> dict[str, type]:
    """Classes of this package that `pipe` is made of, by component name, its own class under `_class_name`."""
    parts = {**pipe.components, "_class_name": pipe}
    classes = {name: type(_compat.unwrap(part)) for name, part in parts.items()}
    return {name: cls for name, cls in classes.items() if cls.__module__.partition(".")[0] == _PACKAGE}


def _write_card(pipe: Any, folder: Path, repo_id: str | None) -> None:
    (folder / CARD).write_text(pipeline_card(pipe, repo_id), encoding="utf-8")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_origin(value: Any) -> Any:
    """JSON without the keys in which diffusers and transformers keep where a part was loaded from."""
    if isinstance(value, dict):
        local = {key for key in _PLACE_KEYS if isinstance(value.get(key), str) and os.path.isabs(value[key])}
        gone = {"_name_or_path", *local}
        return {key: _without_origin(inner) for key, inner in value.items() if key not in gone}
    return [_without_origin(inner) for inner in value] if isinstance(value, list) else value


def _refuse_leaks(folder: Path) -> None:
    """No pickle, and no path of this machine."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix in _PICKLES:
            raise ValueError(f"A component writes {name!r}, a pickle, which runs code when it is opened.")
        if file.suffix in _TEXTS:
            _refuse_local_path(name, file.read_text(encoding="utf-8"))


def _refuse_local_path(name: str, text: str) -> None:
    if name.rpartition("/")[2] in _WORD_LISTS:
        return
    here = {str(path) for path in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if len(path.parts) > 1}
    pattern = re.compile(_LOCAL_PATH.format(here="|".join(map(re.escape, sorted(here)))), re.IGNORECASE)
    for part in _json_texts(json.loads(text)) if name.endswith(".json") else [text]:  # JSON as it is meant, unescaped
        if (leak := pattern.search(part)) is not None:
            raise ValueError(f"{name!r} holds {leak.group()!r}, a path of this machine. Take it out, then share.")


def _json_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _json_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _json_texts(inner)


# --- where it goes ---------------------------------------------------------------------------------------------------


def _put_in_place(new: Path, folder: Path, variant: str | None) -> None:
    """Move a complete folder to where it belongs, the index last."""
    if not folder.exists():
        new.rename(folder)
        return
    files = sorted(file.relative_to(new) for file in new.rglob("*") if file.is_file())
    stale: set[str] = set()
    if (folder / INDEX).is_file():
        present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        old = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        stale = _stale(present, old, {file.as_posix() for file in files}, variant)
    for file in sorted(files, key=lambda file: file.as_posix() == INDEX):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / file, folder / file)
    for name in sorted(stale):
        (folder / name).unlink()
        if not any((folder / name).parent.iterdir()):
            (folder / name).parent.rmdir()


def _stale(present: set[str], old: dict[str, Any], new: set[str], variant: str | None) -> set[str]:
    """Files of the pipeline that was saved before which the new one does not have.

    They are the code files and LoRA files that the old index names, and weight files of the new one's components, which
    loaders might prefer: a list of shards comes before a single file. Other variants stay.
    """
    loras = (old.get(recipes.RECIPE_KEY) or {}).get(_loras.KEY, [])
    candidates = {str(row["file"]) for row in loras if isinstance(row, dict) and "file" in row}
    for name in old.get(CLASSES_KEY, {}):
        entry = old.get(name)
        if isinstance(entry, list) and entry and isinstance(entry[0], str):
            candidates.add(f"{entry[0]}.py" if name == "_class_name" else f"{name}/{entry[0]}.py")
    weights = re.compile(_WEIGHTS.format(variant=re.escape(f".{variant}") if variant else ""))
    folders = {name.rpartition("/")[0] for name in new if weights.fullmatch(name.rpartition("/")[2])}
    candidates |= {
        name for name in present if name.rpartition("/")[0] in folders and weights.fullmatch(name.rpartition("/")[2])
    }
    return (candidates & present) - new


def upload_contents(folder: Path) -> dict[str, bytes | Path]:
    """What of a folder is uploaded: name in the repository -> file, or content where that differs from the file."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    contents: dict[str, bytes | Path] = {}
    for name in filter_repo_objects(names, ignore_patterns=list(NEVER_UPLOADED)):
        file = folder / name
        contents[name] = file
        if file.suffix not in _TEXTS:
            continue
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json" and file.name not in _WORD_LISTS:
            cleaned = _without_origin(content := json.loads(text))
            if cleaned != content:
                text = json.dumps(cleaned, indent=2, sort_keys=True) + "\n"
                contents[name] = text.encode()
        _refuse_local_path(name, text)
    return contents


def _is_ours(card: bytes) -> bool:
    """Whether a card was written by this package and not by somebody."""
    return MARKER.encode() in card


def _bytes(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _download(api: HfApi, repo_id: str, name: str, revision: str | None) -> bytes:
    return Path(api.hf_hub_download(repo_id, name, revision=revision)).read_bytes()
