"""`diffusers-ext`: see what there is, try it, prove it, train, share. Also `python -m diffusers_ext.cli`.

What needs torch is imported inside its command: listing and showing methods stays quick.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from . import __version__, proofs, registry
from .registry import PACKAGE_DIR, Method

_INVALID = "invalid"  # the record is not as it was written, so that there is no status
_STATUS_STYLES = {
    "works": "green",
    "upstream": "cyan",
    "stale": "yellow",
    _INVALID: "red",
    "open": "dim",
    "none": "dim",
}
_LISTED = ("works", "upstream", "stale", _INVALID)  # what `methods` lists without `--all`

app = typer.Typer(
    name="diffusers-ext",
    help="Research papers on diffusion models as parts that plug into Hugging Face diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code 2 and one line say what is wrong with the input.

    Args:
        arguments: without the program's name; None takes them from the command line.
    """
    try:
        app(arguments, prog_name="diffusers-ext")
    except ValueError as error:
        if not _is_ours(error):  # a bug, or a library's: its traceback is needed
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


def _is_ours(error: ValueError) -> bool:
    """Whether `error` is about the input: raised by this package, or by the Hub's client about a name."""
    from huggingface_hub.errors import HFValidationError

    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_here = traceback is not None and PACKAGE_DIR in Path(traceback.tb_frame.f_code.co_filename).parents
    return raised_here or isinstance(error, HFValidationError)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the contact sheet and the saved pipeline.")] = Path(
        "diffusers-ext-demo"
    ),
    seed: Annotated[int, typer.Option(help="Added to the seed of each picture.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a picture.")] = None,
) -> None:
    """Pictures from the embedded checkpoint, plain and with DeepCache: time, work, likeness, and a contact sheet."""
    from .demo import run_demo

    run_demo(output, seed=seed, num_inference_steps=steps)


@app.command()
def methods(
    area: Annotated[str | None, typer.Option(help="Only this area of research.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a method.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also those that do not work here yet.")] = False,
) -> None:
    """List the methods that work, that worked with other sources, or that diffusers has already, and count the rest.

    The exit code is 1 where a recorded result is not as it was written.
    """
    rows, errors = [], []
    for row in sorted(registry.methods(area), key=lambda row: (row.area, row.key)):
        try:
            rows.append((row.status, row))
        except ValueError as error:
            rows.append((_INVALID, row))
            errors.append(str(error))
    chosen = [(status, row) for status, row in rows if everything or status in _LISTED]
    if as_json:
        print(json.dumps([_as_dict(row, status) for status, row in chosen], indent=1, ensure_ascii=False))
    else:
        _print_methods(area, rows, chosen)
    for line in errors:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(line)}", highlight=False)
    if errors:
        raise typer.Exit(1)


def _print_methods(area: str | None, rows: list[tuple[str, Method]], chosen: list[tuple[str, Method]]) -> None:
    console = _console()
    cells = [(row.key, status, row.form, row.area, row.arxiv or "", row.title) for status, row in chosen]
    header = ("method", "status", "form", "area", "arXiv", "paper")
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header) - 1)]
    for line in [header, *cells] if cells else []:
        style = "bold" if line is header else None
        texts = [Text(f"{cell:<{width}}  ", style=style or "") for cell, width in zip(line, widths, strict=False)]
        texts[1].stylize(style or _STATUS_STYLES[line[1]])
        console.print(Text.assemble(*texts, (line[-1], style or "")), no_wrap=True, overflow="ellipsis")
    left_out = Counter(status for status, _ in rows) - Counter(status for status, _ in chosen)
    console.print(f"{len(chosen)} of {len(rows)} methods{f' in area {area!r}' if area else ''}.", style="dim")
    if left_out:
        counts = ", ".join(f"{left_out[status]} {status}" for status in _STATUS_STYLES if left_out[status])
        console.print(f"Not listed: {counts}. `--all` lists them.", style="dim")
    console.print("`diffusers-ext show KEY` tells more of one.", style="dim")


@app.command()
def show(key: Annotated[str, typer.Argument(help="Key of a method, as `methods` lists it.")]) -> None:
    """What a method is, how to call it, and what was measured of it."""
    row = registry.get_method(key)
    result = proofs.read_result(key)
    stale = proofs.staleness(row, result) if result else []
    console = _console(soft_wrap=True)
    console.print(f"[bold]{escape(row.title)}[/]")
    facts = {
        "paper": f"https://arxiv.org/abs/{row.arxiv}" if row.arxiv else None,
        "area": row.area,
        "form": row.form,
        "status": row.status,
        "names": ", ".join(row.entry),
    }
    for name, value in facts.items():
        if value:
            style = _STATUS_STYLES[value] if name == "status" else ""
            console.print(f"  {name:<8}[{style}]{escape(value)}[/]" if style else f"  {name:<8}{escape(value)}")
            if name == "status" and stale:
                console.print(f"          {', '.join(stale)}", style=_STATUS_STYLES["stale"])
    for text in (row.summary, row.reason):
        if text:
            console.print(f"\n{escape(text.strip())}")
    if row.usage:
        console.print("\n[bold]How to call it[/]\n")
        console.print("\n".join(f"    {line}" for line in row.usage.strip().splitlines()), markup=False)
    if result is None:
        return
    if result["claims"]:
        console.print(f"\n[bold]Measured[/] {result['recorded']}")
        for claim in result["claims"]:
            console.print(f"  {claim['statement']}", markup=False)
            console.print(f"    {proofs.describe_claim(claim)}", markup=False)
    if result["proofs"]:
        outcomes = ", ".join(f"{name} {outcome}" for name, outcome in result["proofs"].items())
        console.print(f"\n[bold]Proofs[/] {outcomes}")


@app.command()
def verify(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys of methods.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All methods that have tests or a result.")] = False,
    record: Annotated[bool, typer.Option(help="Write which proofs passed to the recorded results.")] = False,
) -> None:
    """Run the proofs of methods, in a source checkout: exact, reference, claim, loads, card."""
    from . import verify as verification

    if everything == bool(keys):
        raise ValueError("Give the keys of methods, or `--all`.")
    raise typer.Exit(verification.verify(verification.verifiable() if everything else keys or [], record=record))


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="[KEY|AREA]", help="A method, or an area of research.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All benchmarks.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few pictures, compared with the record.")] = False,
    ci: Annotated[bool, typer.Option("--ci", help="One claim, chosen by the commit, as --quick.")] = False,
    commit: Annotated[str | None, typer.Option(help="With --ci: hash of the commit, where git cannot tell.")] = None,
) -> None:
    """Measure claims of methods and record them, in a source checkout.

    With --quick, a part is measured again, and the exit code is 1 where it contradicts the record.
    """
    from . import bench as benchmarks

    if sum((name is not None, everything, ci)) != 1:
        raise ValueError("Give one of: the key of a method, an area, `--all`, `--ci`.")
    if commit is not None and not ci:
        raise ValueError("`--commit` goes with `--ci`.")
    if ci:
        commit = commit or benchmarks.head()
        key, claim = benchmarks.claim_of(commit)
        candidates, stale = benchmarks.claims()
        _console().print(f"Commit {commit} measures claim {claim} of {key} again, of {len(candidates)} claims.")
        if stale:
            _console().print(f"Left out, since their records are stale: {', '.join(stale)}.", style="yellow")
        sys.stdout.flush()
        raise typer.Exit(benchmarks.run(key, ["--quick", "--claim", claim, "--draw", commit]))
    keys = benchmarks.keys() if name is None else benchmarks.chosen(name)
    codes = {key: benchmarks.run(key, ["--quick"] if quick else []) for key in keys}
    failed = [key for key, code in codes.items() if code]
    if len(codes) > 1:
        _console().print(f"{len(codes)} benchmarks ran; failed: {', '.join(failed) or 'none'}.")
    raise typer.Exit(codes[failed[0]] if failed else 0)


@app.command()
def new(
    form: Annotated[str, typer.Argument(help="What it is to diffusers: scheduler, hook, pipeline, trainer, ...")],
    key: Annotated[str, typer.Argument(help="Key of an open method of the catalogue, or of a new one.")],
    title: Annotated[str | None, typer.Option(help="Title of the paper, for a new key.")] = None,
    arxiv: Annotated[str | None, typer.Option(help="Its arXiv number, for a new key.")] = None,
    area: Annotated[str | None, typer.Option(help="Area of research, for a new key.")] = None,
) -> None:
    """Write the files of a new method, in a source checkout: code, tests, card, benchmark, names, row of the catalogue."""
    from . import scaffold

    files = scaffold.plan(form, key, title=title, arxiv=arxiv, area=area)
    scaffold.write(files)
    for verb, paths in (("wrote", files.created), ("added to", files.edited)):
        for path in paths:
            print(f"{verb:<9}{path.relative_to(scaffold.ROOT).as_posix()}")
    print(f"Its rules and proofs: python -m pytest tests/methods/test_{key}.py tests/common/test_{form}.py -k {key}")
    for command in files.then:
        print(f"Also: {command}")


@app.command("app")
def browser(
    model: Annotated[str, typer.Option(help="Of the zoo, a repository on the Hub, or a folder.")] = "avatars-sd",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 on, unless given.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also a public link, by gradio's servers.")] = False,
) -> None:
    """Try methods on a pipeline in the browser, side by side with the plain one."""
    from .app import serve

    serve(model, host=host, port=port, share=share)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def train(
    name: Annotated[str, typer.Argument(help="What to train, for example text_to_image.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on; `--help` lists them.")] = None,
) -> None:
    """Train by `accelerate launch -m diffusers_ext.training.train_NAME`."""
    there = sorted(file.stem.removeprefix("train_") for file in (PACKAGE_DIR / "training").glob("train_*.py"))
    if name not in there:
        raise ValueError(f"`name` is {name!r}; allowed are {', '.join(there)}.")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    raise typer.Exit(subprocess.call([*command, "-m", f"diffusers_ext.training.train_{name}", *(arguments or [])]))


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="Folder of a saved pipeline.")]) -> None:
    """Write the card (README.md) of a saved pipeline: what is on, how to load it, what was measured."""
    from . import cards

    text = cards.pipeline_card(folder)
    file = folder / "README.md"
    if file.exists() and cards.MARKER not in file.read_text(encoding="utf-8"):
        raise ValueError(f"{str(file)!r} is somebody's own text, and stays. Move it away to have a card written.")
    file.write_text(text, encoding="utf-8")
    print(file)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved pipeline, or the output of a training script.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    branch: Annotated[str | None, typer.Option(help="Commit to this branch; made where it does not exist.")] = None,
) -> None:
    """Put a folder on the Hugging Face Hub in one commit."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import validate_repo_id

    from . import hub

    if dry_run:
        validate_repo_id(repo)
        if not folder.is_dir():
            raise ValueError(f"`folder` is {str(folder)!r}, which is not a folder.")
        for path, content in hub.upload_contents(folder).items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>13,}  {path}")
        return
    try:
        commit = hub.upload_folder(folder, repo, private=private or None, revision=branch)
    except (HfHubHTTPError, ConnectionError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    print(commit.commit_url)


def _console(**options: Any) -> Console:
    """Standard output; where it is no terminal, lines are as long as they are, for other programs."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000, **options)


def _as_dict(row: Method, status: str) -> dict[str, Any]:
    return {
        "key": row.key,
        "status": status,
        "form": row.form,
        "area": row.area,
        "title": row.title,
        "arxiv": row.arxiv,
        "entry": list(row.entry),
        "summary": row.summary,
        "usage": row.usage,
        "reason": row.reason,
        "version": row.version,
    }


if __name__ == "__main__":
    main()
