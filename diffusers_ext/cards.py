"""Cards: what a method does and what a shared pipeline is, rendered from the registry and the recorded results.

Numbers come from `results/<key>.json` alone; nobody types them into a card.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import proofs
from .registry import Method, get_method

TEMPLATES = Path(__file__).resolve().parent / "hub_cards"
# A card with this line is ours to write again; without it, it is somebody's own and stays.
MARKER = (
    "<!-- Written by diffusers_ext. Take this line out to keep your own text: the card is then never written over. -->"
)
# Stands in a card for where the pipeline is, until that is known.
PLACE = "path/to/this/folder"
_SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def method_card(key: str) -> str:
    """The card of a method, as markdown with metadata. The plots that it shows lie beside it: see `save_method_card`.

    Raises:
        ValueError: there is no method `key`, it has no written part `hub_cards/<key>.md`, or its recorded result was
            edited.
    """
    from . import plots

    row = get_method(key)
    result = proofs.read_result(key)
    drawn = [f"![{title}]({name})" for name, title, _ in plots.of_method(key, result)]
    body = render(
        "_method",
        title=row.title,
        summary=row.summary,
        facts=_method_facts(row),
        written=written_part(key),
        measured="\n\n".join([_measured(row, result), *drawn]),
    )
    tags = ["diffusers_ext", key, row.area]
    data: dict[str, Any] = {"library_name": "diffusers", "license": "apache-2.0", "tags": tags}
    if result is not None and result["claims"]:
        data |= {"model_name": key, "eval_results": _eval_results(row, result)}
    return card_text(data, body)


def save_method_card(key: str, folder: str | os.PathLike) -> Path:
    """Write the card of a method as `README.md`, and the plots in it, into the folder of a repository.

    Plots need matplotlib.

    Raises:
        ValueError: as `method_card`.
    """
    from . import plots

    text, pictures = method_card(key), plots.files(key)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def pipeline_card(source: Any, repo_id: str | None = None) -> str:
    """The card of a shared pipeline: what it is, what is on, how to load it, what was measured of it, and its limits.

    Args:
        source: a pipeline, or a folder that `save_pretrained` wrote.
        repo_id: where it is on the Hub; None writes `PLACE`.

    Returns:
        Markdown with metadata.

    Raises:
        ValueError: a folder without `model_index.json`, or the recorded result of a method was edited.
    """
    from .hub import describe
    from .quantization import summary

    index, origin = describe(source)
    recipe = index.get("_dx_recipe") or {}
    rows = [(_known_method(entry["method"]), entry) for entry in recipe.get("methods", [])]
    loras = recipe.get("loras", [])
    classes = index.get("_dx_classes", {})
    class_name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][1]
    known = list({row.key: row for row, _ in rows if row is not None}.values())
    metadata = _origin_metadata(origin)
    body = render(
        "_pipeline",
        title=repo_id.rpartition("/")[2] if repo_id else class_name,
        what="\n\n".join(filter(None, (_what(class_name, metadata.get("base_model"), rows, loras), summary(source)))),
        recipe=_recipe_table(rows),
        loras=_lora_table(loras),
        loading=_loading(class_name, repo_id or PLACE, rows, loras, classes),
        measured="\n\n".join(
            filter(None, (_measured(row, proofs.read_result(row.key), f"### {row.title}") for row in known))
        ),
        limits="\n\n".join(filter(None, (_limits(row) for row in known))),
        papers="\n".join(f"- {_paper(row)}" for row in known if row.arxiv),
    )
    tags = ["diffusers_ext", *(row.key for row in known), *(["lora"] if loras else [])]
    return card_text({"library_name": "diffusers", "tags": tags, **metadata}, body)


def written_part(key: str) -> str:
    """The part of a method's card that is written by hand: what it does, when to use it and when not, how to call it.

    Raises:
        ValueError: there is none.
    """
    file = TEMPLATES / f"{key}.md"
    if not file.is_file() or key.startswith("_"):
        raise ValueError(f"Method {key!r} has no card: hub_cards/{key}.md is not there.")
    return file.read_text(encoding="utf-8").strip()


def snippet(key: str) -> str:
    """The Python code under "How to call it" in a method's card.

    Raises:
        ValueError: there is no written part, or it has no such code.
    """
    found = _SNIPPET.search(_section(written_part(key), "How to call it"))
    if found is None:
        raise ValueError(f"hub_cards/{key}.md has no Python code under 'How to call it'.")
    return found[1]


def name_of(row: Method) -> str:
    """What a paper calls its method, where its title says so in one or two words before a colon; else its key."""
    name, colon, _ = row.title.partition(":")
    return name if colon and len(name.split()) <= 2 else row.key


# --- the parts -------------------------------------------------------------------------------------------------------


def render(template: str, **values: str) -> str:
    text = string.Template((TEMPLATES / f"{template}.md").read_text(encoding="utf-8")).substitute(values)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"^## [^\n]+\n\n(?=## |\Z)", "", text, flags=re.MULTILINE).strip()  # headings with nothing under them


def card_text(data: Mapping[str, Any], body: str) -> str:
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(**data).to_yaml(line_break="\n")
    return f"---\n{metadata}\n---\n\n{MARKER}\n\n{body}\n"


def table(columns: list[Any], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "yes", False: "no", None: ""}[value]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def _paper(row: Method) -> str:
    return f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title


def _method_facts(row: Method) -> str:
    facts = [f"- Method `{row.key}`, form `{row.form}`, area `{row.area}`, status `{row.status}`"]
    if row.entry:
        facts.append(f"- Names: {', '.join(f'`{name}`' for name in row.entry)}")
    if row.arxiv:
        facts.append(f"- Paper: {_paper(row)}")
    return "\n".join(facts)


def _measured(row: Method, result: Mapping[str, Any] | None, heading: str = "") -> str:
    """Claims and tables of a recorded result; nothing where nothing was measured."""
    if result is None or not result["claims"]:
        return ""
    on = f"on `{result['settings']['model']}`" if "model" in result["settings"] else "on small models"
    where = f"Measured {on}, recorded {result['recorded']}, and not measured again on other models."
    parts = [heading] if heading else []
    parts.append(f"{where} The code has changed since." if row.status == "stale" else where)
    claims = [
        [
            claim["statement"],
            f"{claim['value']:.4g} {claim['unit']}".strip(),
            "{:.4g} to {:.4g}".format(*claim["interval"]) if claim["interval"][0] < claim["interval"][1] else "",
            f"{claim['goal']['op']} {claim['goal']['value']:.4g}" if claim["goal"] else "",
            claim["holds"],
        ]
        for claim in result["claims"]
    ]
    parts.append(table(["Claim", "Measured", "Interval", "Goal", "Holds here"], claims))
    for name, content in result["tables"].items():
        parts += [f"**{name}**", table(content["columns"], content["rows"])]
    return "\n\n".join(parts)


def _eval_results(row: Method, result: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    model = str(result["settings"].get("model", "small models"))
    return [
        EvalResult(
            task_type=row.area,
            dataset_type=model,
            dataset_name=model,
            metric_type=claim["name"],
            metric_name=claim["statement"],
            metric_value=float(claim["value"]),  # a numpy number would become Python code in the YAML
        )
        for claim in result["claims"]
    ]


def _known_method(key: str) -> Method | None:
    try:
        return get_method(key)
    except ValueError:  # a recipe may name a method that is not installed here
        return None


def _what(class_name: str, base_model: str | None, rows: list, loras: list) -> str:
    names = [name_of(row) if row is not None else entry["method"] for row, entry in rows]
    names += [f"LoRA `{lora['adapter_name']}`" for lora in loras]
    text = f"A `{class_name}` for [diffusers](https://github.com/huggingface/diffusers)"
    if base_model is not None:
        text += f", made from [{base_model}](https://huggingface.co/{base_model})"
    return f"{text}, with {', '.join(dict.fromkeys(names))}." if names else f"{text}."


def _recipe_table(rows: list) -> str:
    if not rows:
        return ""
    lines = [
        [
            f"`{entry['method']}`",
            f"`{entry['component']}`" if entry.get("component") else "the pipeline",
            ", ".join(f"{name}={_short(value)}" for name, value in entry.get("config", {}).items()),
            row.summary if row is not None else "",
        ]
        for row, entry in rows
    ]
    return table(["Method", "On", "Settings", "What it does"], lines)


def _short(value: Any) -> str:
    """A value as Python writes it; long ones, such as tables of numbers, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _lora_table(loras: list) -> str:
    def weight(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {number:g}" for name, number in value.items())
        return "not active" if value is None else f"{value:g}"

    lines = [[f"`{lora['adapter_name']}`", weight(lora["weight"]), f"`{lora['file']}`"] for lora in loras]
    return table(["LoRA", "Weight", "File"], lines) if lines else ""


def _loading(class_name: str, where: str, rows: list, loras: list, classes: Mapping[str, str]) -> str:
    ours = f'import diffusers_ext as dx\n\npipe = dx.Pipeline.from_pretrained("{where}")'
    flag = ", trust_remote_code=True" if classes else ""
    stock = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{where}"{flag})'
    if not rows and not loras and not classes:
        return f"It is an ordinary pipeline:\n\n```python\n{stock}\n```"
    parts = [f"With `diffusers_ext`, which brings back all of it:\n\n```python\n{ours}\n```"]
    parts.append(f"With diffusers alone:\n\n```python\n{stock}\n```")
    if classes:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(classes.values()))
        parts.append(f"The code of {names} is in this repository; read it before you pass `trust_remote_code=True`.")
    left_out = [f"`{key}`" for key in dict.fromkeys(entry["method"] for _, entry in rows)]
    if left_out:
        parts.append(f"Loading with diffusers alone leaves out {', '.join(left_out)}: the pipeline runs without.")
    if loras:
        code = _lora_code(where, loras)
        parts.append(
            f"Loading with diffusers alone leaves out the LoRA files; load them with\n\n```python\n{code}\n```"
        )
    return "\n\n".join(parts)


def _lora_code(where: str, loras: list) -> str:
    lines = []
    for lora in loras:
        folder, _, file = lora["file"].rpartition("/")
        lines.append(
            f'pipe.load_lora_weights("{where}", subfolder="{folder}", weight_name="{file}", '
            f'adapter_name="{lora["adapter_name"]}")'
        )
    active = [lora for lora in loras if lora["weight"] is not None]
    if active:
        names, weights = [lora["adapter_name"] for lora in active], [lora["weight"] for lora in active]
        lines.append(f"pipe.set_adapters({names}, {weights})")
    return "\n".join(lines)


def _limits(row: Method) -> str:
    """A method's "When not to use it", under its title."""
    try:
        text = _section(written_part(row.key), "When not to use it")
    except ValueError:  # a third party's method has its card elsewhere
        return ""
    return f"### {row.title}\n\n{text}"


def _section(text: str, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _origin_metadata(origin: str | None) -> dict[str, Any]:
    """Base model and licence, as far as they are known without asking the Hub. A local path is no base model."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if origin is None:
        return {}
    metadata: dict[str, Any] = {}
    if os.path.isdir(origin):
        card: Any = os.path.join(origin, "README.md")
    else:
        try:
            validate_repo_id(origin)
        except HFValidationError:
            return {}
        metadata["base_model"] = origin
        card = try_to_load_from_cache(origin, "README.md")
    if isinstance(card, str) and os.path.isfile(card):
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        for name in ("base_model", "license", "license_name", "license_link", "pipeline_tag"):
            if getattr(data, name, None) is not None:
                metadata.setdefault(name, getattr(data, name))
    return metadata
