"""The command line: what it lists and shows, what it passes on, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from diffusers_ext import __version__, cli, proofs, registry

from .fresh import ROOT, run_fresh
from .hub_server import USER, HubServer


@pytest.fixture
def run(capsys):
    """Run a command in this process: its exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def called(monkeypatch):
    """Commands that would have been run; each exits with 3."""
    commands = []
    monkeypatch.setattr(subprocess, "call", lambda command, **options: commands.append((command, options)) or 3)
    return commands


@pytest.fixture
def saved(tmp_path):
    """What a card and an upload need of a saved pipeline, with something in it that is never uploaded."""
    recipe = {"schema": 1, "methods": [{"method": "deepcache", "version": 1, "component": "unet", "config": {}}]}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "_dx_recipe": recipe}
    folder = tmp_path / "saved"
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-10" / "optimizer.bin").write_bytes(b"state")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["methods", "--all"], ["methods", "--json"], ["show", "deepcache"]])
def test_listing_imports_neither_torch_nor_diffusers(arguments):
    run_fresh(f"""
        import sys
        from diffusers_ext.cli import main
        try:
            main({arguments!r})
        except SystemExit as left:
            assert not left.code
        heavy = {{"torch", "diffusers", "transformers", "numpy", "huggingface_hub"}} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "diffusers_ext.cli", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == __version__


# --- methods and show ------------------------------------------------------------------------------------------------


def test_methods_lists_what_works_and_counts_the_rest(run):
    code, out, _ = run("methods")
    rows = registry.methods()
    listed = {row.key for row in rows if row.status in ("works", "upstream", "stale")}
    lines = out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines[1 : 1 + len(listed)]} == listed
    assert f"{len(listed)} of {len(rows)} methods" in out
    for status in ("open", "none"):
        assert f"{sum(row.status == status for row in rows)} {status}" in out


def test_methods_all_lists_each_paper_in_a_line_of_its_own(run):
    _, out, _ = run("methods", "--all")
    lines = out.splitlines()
    for row in registry.methods():
        assert any(line.split()[0] == row.key and line.endswith(row.title) for line in lines), row.key


def test_methods_of_one_area(run):
    _, out, _ = run("methods", "--area", "acceleration", "--all", "--json")
    rows = json.loads(out)
    assert [row["key"] for row in rows] == sorted(row.key for row in registry.methods("acceleration"))
    [row] = [row for row in rows if row["key"] == "deepcache"]
    assert row["entry"] == ["DeepCacheConfig"]
    assert row["status"] == registry.get_method("deepcache").status


def test_show_tells_how_to_call_it_and_what_was_measured(run):
    code, out, _ = run("show", "deepcache")
    row = registry.get_method("deepcache")
    assert code == 0
    for text in (row.title, f"https://arxiv.org/abs/{row.arxiv}", row.status, row.summary, "dx.enable(pipe"):
        assert text in out
    result = proofs.read_result("deepcache")
    for claim in result["claims"] if result else []:
        assert claim["statement"] in out
        assert proofs.describe_claim(claim) in out


def test_show_gives_the_reason_where_there_is_no_system(run):
    row = next(row for row in registry.methods() if row.form == "none")
    _, out, _ = run("show", row.key)
    assert row.reason is not None and row.reason in out


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["methods", "--area", "cooking"], "acceleration, "),
        (["show", "deepcash"], "deepcache"),
        (["bench", "deepcash"], "deepcache (area acceleration)"),
        (["bench", "cooking"], "deepcache (area acceleration)"),
        (["bench"], "--all"),
        (["bench", "deepcache", "--ci"], "--ci"),
        (["bench", "deepcache", "--commit", "a" * 40], "--commit"),
        (["bench", "--ci", "--commit", "main"], "'main'"),
        (["train", "everything"], "text_to_image"),
        (["verify"], "--all"),
        (["verify", "deepcache", "--all"], "--all"),
        (["card", "no_such_folder"], "no_such_folder"),
        (["push", "no_such_folder", "me/it", "--dry-run"], "no_such_folder"),
        (["push", ".", "me//it"], "me//it"),
    ],
)
def test_wrong_input_gives_one_line_and_code_2(run, arguments, named):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert named in err


def test_errors_that_are_not_about_the_input_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(registry, "methods", lambda area=None: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["methods"])


# --- what it runs ----------------------------------------------------------------------------------------------------


def test_train_passes_everything_on(run, called):
    code, _, _ = run("train", "text_to_image", "--resolution", "32", "--help", "--", "-x")
    [(command, _)] = called
    assert code == 3
    assert command[0] == sys.executable
    assert command[3:] == [
        "launch", "-m", "diffusers_ext.training.train_text_to_image", "--resolution", "32", "--help", "--", "-x",
    ]  # fmt: skip


@pytest.mark.slow
def test_train_reaches_the_script():
    result = subprocess.run(
        [sys.executable, "-m", "diffusers_ext.cli", "train", "text_to_image", "--help"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--pretrained_model_name_or_path" in result.stdout


@pytest.fixture
def benched(monkeypatch):
    """Benchmarks that would have been run, as (key, options). Those of `two` exit with 3, the others with 0."""
    from diffusers_ext import bench

    runs = []
    monkeypatch.setattr(bench, "keys", lambda: ["one", "two", "three"])
    monkeypatch.setattr(bench, "chosen", lambda name: {"one": ["one"], "audio": ["one", "two"]}[name])
    monkeypatch.setattr(bench, "head", lambda: "c" * 40)
    monkeypatch.setattr(bench, "claims", lambda: ([("one", "time"), ("one", "psnr")], ["three"]))
    monkeypatch.setattr(bench, "run", lambda key, options=(): runs.append((key, list(options))) or 3 * (key == "two"))
    return runs


@pytest.mark.parametrize(
    ("arguments", "wanted", "code"),
    [
        (["one"], [("one", [])], 0),
        (["one", "--quick"], [("one", ["--quick"])], 0),
        (["audio", "--quick"], [("one", ["--quick"]), ("two", ["--quick"])], 3),
        (["--all"], [("one", []), ("two", []), ("three", [])], 3),  # the third runs although the second failed
    ],
)
def test_bench_runs_a_method_an_area_or_all(run, benched, arguments, wanted, code):
    assert run("bench", *arguments)[0] == code
    assert benched == wanted


@pytest.mark.parametrize("commit", [None, "a" * 40])
def test_bench_ci_measures_the_claim_of_the_commit(run, benched, commit):
    code, out, _ = run("bench", "--ci", *(["--commit", commit] if commit else []))
    [(key, options)] = benched
    assert code == 0 and key == "one"
    assert options[:2] == ["--quick", "--claim"] and options[2] in ("time", "psnr")
    assert options[3:] == ["--draw", commit or "c" * 40]
    assert options[2] in out and (commit or "c" * 40) in out and "three" in out  # whose record is stale


@pytest.mark.parametrize(
    ("arguments", "keys", "record"),
    [
        (["deepcache", "pag"], ["deepcache", "pag"], False),
        (["--all"], ["one", "two"], False),
        (["deepcache", "--record"], ["deepcache"], True),
    ],
)
def test_verify_hands_over(run, monkeypatch, arguments, keys, record):
    from diffusers_ext import verify

    seen = []
    monkeypatch.setattr(verify, "verifiable", lambda: ["one", "two"])
    monkeypatch.setattr(verify, "verify", lambda keys, record: seen.append((keys, record)) or 1)
    code, _, _ = run("verify", *arguments)
    assert code == 1
    assert seen == [(keys, record)]


# --- card and push ---------------------------------------------------------------------------------------------------


def test_card_is_written_again_but_not_over_somebodys_own(run, saved):
    file = saved / "README.md"
    for _ in range(2):
        code, out, _ = run("card", str(saved))
        assert code == 0 and out.strip() == str(file)
        assert "deepcache" in file.read_text()
    file.write_text("My own words.")
    code, _, err = run("card", str(saved))
    assert code == 2 and "README.md" in err
    assert file.read_text() == "My own words."


def test_push_dry_run_lists_and_does_no_more(run, saved):
    code, out, _ = run("push", str(saved), "me/it", "--dry-run")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        [f"{(saved / 'model_index.json').stat().st_size:,}", "model_index.json"]
    ]


def test_push_to_a_branch_of_a_private_repository(saved):
    command = [sys.executable, "-m", "diffusers_ext.cli", "push", str(saved), f"{USER}/it", "--private"]
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with HubServer() as hub:
        env = inherited | hub.env | {"PYTHONPATH": str(ROOT)}
        pushed = subprocess.run([*command, "--branch", "trial"], capture_output=True, text=True, env=env, timeout=300)
        assert pushed.returncode == 0, pushed.stderr
        assert hub.repos()[f"{USER}/it"].private
        assert "model_index.json" in hub.files(f"{USER}/it", "trial")
        assert "model_index.json" not in hub.files(f"{USER}/it")
        refused = subprocess.run(
            command, capture_output=True, text=True, env=env | {"HF_TOKEN": "hf_wrong"}, timeout=300
        )
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: ") and "Traceback" not in refused.stderr
