"""Pushing and pulling through a Hub server on this machine, spoken to by the real `huggingface_hub` client.

Two processes do all the work, since a process takes seconds to import diffusers: one with this package, which pushes
and pulls, and one in which it cannot be imported. Each prints what it saw, and the tests look at that.
"""

from __future__ import annotations

import json
import re

import pytest

import diffusers_ext as dx
from tests.fresh import run_fresh
from tests.hub_server import TOKEN, HubServer

# What both processes begin with. A drawing is given as the hash of its latents: the same bits or not.
COMMON = """
    import hashlib, json, sys
    from pathlib import Path

    work, zoo = Path({work!r}), {zoo!r}
    seen = {{}}

    def draw(pipe):
        import torch

        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        latents = pipe("a man with a hat", num_inference_steps=3, generator=generator, output_type="latent").images
        return hashlib.sha256(latents.numpy().tobytes()).hexdigest()

    def error(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except Exception as caught:
            return f"{{type(caught).__name__}}: {{caught}}"
        return None
"""
WITH_US = """
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from huggingface_hub import HfApi
    from peft import LoraConfig

    import diffusers_ext as dx
    from diffusers_ext.hub import upload_folder
    from tests import toy

    api = HfApi()

    def load(name, **kwargs):
        return dx.Pipeline.from_pretrained(name, **kwargs)

    # A pipeline of diffusers with a method on, private, and the same without.
    pipe = StableDiffusionPipeline.from_pretrained(zoo)
    seen["plain"] = draw(pipe)
    seen["cached"] = draw(dx.enable(pipe, dx.DeepCacheConfig(interval=2)))
    pushed = dx.push_to_hub(pipe, "tester/cached", private=True, commit_message="first")
    seen["commit"] = [type(pushed).__name__, pushed.commit_message]
    loaded = load("tester/cached")
    seen["cached pulled"] = [draw(loaded), dx.status(loaded)[0].config.interval, type(loaded).__name__]
    seen["cached offline"] = draw(load("tester/cached", local_files_only=True))
    elsewhere = load("tester/cached", cache_dir=work / "cache", token="{token}", revision=pushed.oid)
    seen["cached elsewhere"] = draw(elsewhere)
    seen["no token"] = error(load, "tester/cached", token=False, cache_dir=work / "empty cache")

    # LoRA files, on a branch; then without them.
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    dx.disable(pipe)
    pipe.unet.add_adapter(config, "style")
    pipe.set_adapters(["style"], [0.7])
    seen["styled"] = draw(pipe)
    dx.push_to_hub(pipe, "tester/cached", revision="styled")
    seen["styled pulled"] = draw(load("tester/cached", revision="styled"))
    seen["main pulled"] = draw(load("tester/cached"))
    pipe.fuse_lora()
    seen["fused"] = error(dx.push_to_hub, pipe, "tester/fused")
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    dx.push_to_hub(pipe, "tester/cached", revision="unstyled")
    dx.push_to_hub(pipe, "tester/open")
    asked = dx.push_to_hub(dx.enable(pipe, dx.DeepCacheConfig()), "tester/open", create_pr=True)
    seen["pull request"] = asked.pr_revision
    dx.disable(pipe)

    # Classes of ours.
    (work / "toy").mkdir()
    with toy.installed(work / "toy") as toys:
        ours = toy.toy_pipeline(pipe, toys, hold=0.2)
        seen["toy"] = draw(ours)
        dx.push_to_hub(ours, "tester/toy")
        dx.save_pretrained(ours, work / "saved")
        loaded = load("tester/toy")
        types = [type(loaded), type(loaded.scheduler), type(loaded.unet)]
        seen["toy pulled"] = [draw(loaded), types == [toys.ToyPipeline, toys.ToyScheduler, toys.ToyUNet]]
        ours.scheduler = StableDiffusionPipeline.from_pretrained(zoo).scheduler
        dx.push_to_hub(ours, "tester/toy", revision="other-scheduler")

    # A card that somebody wrote, and our own.
    api.create_repo("tester/card")
    mine = b"---\\nlicense: mit\\n---\\n# Mine"
    api.upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="tester/card")
    dx.push_to_hub(pipe, "card")

    # The output of a training script.
    out = work / "out"
    kept = ["pytorch_lora_weights.safetensors", "picture.png", "unet/ok.safetensors"]
    left = ["checkpoint-10/model.safetensors", ".partial-checkpoint-20/x.json", "logs/events"]
    left += ["unet/optimizer.bin", "random_states.pkl", "scheduler.pt"]
    for name in kept + left:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    config = {{"_name_or_path": str(out), "a": [{{"_name_or_path": "x"}}]}}
    (out / "unet" / "config.json").write_text(json.dumps(config))
    upload_folder(out, "tester/trained")
    seen["config here"] = json.loads((out / "unet" / "config.json").read_text())["_name_or_path"] == str(out)
    folder = dx.save_pretrained(dx.enable(pipe, dx.DeepCacheConfig()), work / "plain")
    seen["card here"] = "path/to/this/folder" in (folder / "README.md").read_text()
    upload_folder(folder, "tester/plain")
    (out / "README.md").write_text(f"Trained on {{out}}/data")
    seen["leak"] = error(upload_folder, out, "tester/leaked")
    seen["bad name"] = error(upload_folder, out, "a/b/c")
    seen["no folder"] = error(upload_folder, work / "none", "tester/x")
    (work / "empty").mkdir()
    seen["empty"] = error(upload_folder, work / "empty", "tester/x")

    seen["no repository"] = error(load, "tester/none")
    seen["no index"] = error(load, "tester/trained")
    seen["no revision"] = error(load, "tester/open", revision="none")
"""
WITHOUT_US = """
    sys.modules["diffusers_ext"] = None  # whoever imports it gets an ImportError
    from diffusers import DiffusionPipeline

    def load(name, **kwargs):
        return DiffusionPipeline.from_pretrained(name, **kwargs)

    seen["cached"] = draw(load("tester/cached"))
    styled = load("tester/cached", revision="styled")
    seen["not styled"] = draw(styled)
    folder, name = "lora/style", "pytorch_lora_weights.safetensors"
    styled.load_lora_weights(
        "tester/cached", revision="styled", subfolder=folder, weight_name=name, adapter_name="style"
    )
    styled.set_adapters(["style"], [0.7])
    seen["styled"] = draw(styled)

    seen["toy untrusted"] = [error(load, "tester/toy"), error(load, work / "saved")]
    pulled, local = load("tester/toy", trust_remote_code=True), load(work / "saved", trust_remote_code=True)
    seen["toy"] = [draw(pulled), draw(local)]
    scheduler = pulled.scheduler
    seen["toy says"] = [type(pulled).__name__, pulled.say(), type(scheduler).__name__, scheduler.config.hold]
    seen["toy's modules"] = [type(part).__module__ for part in (pulled, scheduler, pulled.unet)]
    seen["imported"] = sorted(name for name in sys.modules if name.startswith("diffusers_ext") and sys.modules[name])
"""
END = """
    print("SEEN" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer(page_size=7) as server:
        yield server


@pytest.fixture(scope="module")
def sessions(hub, tmp_path_factory):
    """What the process with this package saw, and what the one without saw."""
    place = {"work": str(tmp_path_factory.mktemp("hub")), "zoo": str(dx.zoo_path("avatars-sd")), "token": TOKEN}
    seen = []
    for body in (WITH_US, WITHOUT_US):
        output = run_fresh((COMMON + body).format(**place) + END, env=hub.env)
        seen.append(json.loads(output.rpartition("SEEN")[2]))
    return seen


def test_the_server_speaks_the_protocol():
    """What the other tests rest on: the client's own calls, without diffusers."""
    code = """
        import os
        import tempfile
        from pathlib import Path

        from huggingface_hub import (
            CommitOperationAdd, CommitOperationDelete, HfApi, errors, hf_hub_download, snapshot_download
        )
        from huggingface_hub.utils import get_session

        def raises(error, call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except error:
                return True

        api, repo = HfApi(), "tester/x"
        assert api.whoami()["name"] == "tester"
        api.create_repo(repo, private=True)
        assert raises(errors.HfHubHTTPError, api.create_repo, repo)
        folder = Path(tempfile.mkdtemp())
        (folder / "unet" / "deep").mkdir(parents=True)
        (folder / "README.md").write_text("---\\ntags: [a]\\n---\\n")
        (folder / "unet" / "w.safetensors").write_bytes(bytes(100_000))
        (folder / "unet" / "deep" / "c.json").write_text("{}")
        first = api.upload_folder(folder_path=folder, repo_id=repo)
        assert api.upload_folder(folder_path=folder, repo_id=repo).oid == first.oid  # nothing new: no commit
        files = [".gitattributes", "README.md", "unet/deep/c.json", "unet/w.safetensors"]
        assert api.list_repo_files(repo) == files
        assert [entry.path for entry in api.list_repo_tree(repo)] == [".gitattributes", "README.md", "unet"]
        assert [entry.path for entry in api.list_repo_tree(repo, "unet/deep")] == ["unet/deep/c.json"]
        assert [entry.path for entry in api.get_paths_info(repo, ["unet", "none"])] == ["unet"]
        copy = Path(snapshot_download(repo))
        assert (copy / "unet" / "w.safetensors").read_bytes() == bytes(100_000)

        api.create_branch(repo, branch="dev/a")
        api.create_branch(repo, branch="dev/a", exist_ok=True)
        changes = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("unet/deep/")]
        api.create_commit(repo, changes, commit_message="m", revision="dev/a")
        there = [".gitattributes", "README.md", "new.txt", "unet/w.safetensors"]
        assert api.list_repo_files(repo, revision="dev/a") == there
        assert {branch.name for branch in api.list_repo_refs(repo).branches} == {"main", "dev/a"}
        asked = api.create_commit(repo, [CommitOperationDelete("README.md")], commit_message="m", create_pr=True)
        assert "README.md" not in api.list_repo_files(repo, revision=asked.pr_revision)
        assert api.list_repo_files(repo) == files
        api.create_tag(repo, tag="v1")
        api.delete_file("unet/w.safetensors", repo)
        assert api.list_repo_files(repo, revision="v1") == files

        url = api.endpoint + "/tester/x/resolve/v1/unet/w.safetensors"
        headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}", "Range": "bytes=10-19"}
        part = get_session().get(url, headers=headers, follow_redirects=True)
        assert (part.status_code, len(part.content), part.headers["content-range"]) == (206, 10, "bytes 10-19/100000")

        assert raises(errors.RepositoryNotFoundError, api.model_info, "tester/none")
        assert raises(errors.RepositoryNotFoundError, api.model_info, repo, token=False)
        assert raises(errors.EntryNotFoundError, hf_hub_download, repo, "none")
        assert raises(errors.RevisionNotFoundError, hf_hub_download, repo, "README.md", revision="none")
        assert raises(errors.HfHubHTTPError, api.whoami, token="hf_wrong")
        outdated = {"commit_message": "m", "parent_commit": "0" * 40}
        assert raises(errors.HfHubHTTPError, api.create_commit, repo, [CommitOperationAdd("x", b"x")], **outdated)
        api.delete_branch(repo, branch="dev/a")
        api.delete_repo(repo)
        assert not api.repo_exists(repo)
    """
    for lfs in (True, False):
        with HubServer(lfs=lfs, page_size=2) as server:
            run_fresh(code, env=server.env)
        assert any(request.method == "PUT" for request in server.log) == lfs
        assert not [request for request in server.log if request.status >= 500]


def test_a_pipeline_with_a_method_on_travels(hub, sessions):
    with_us, without_us = sessions
    assert with_us["commit"] == ["CommitInfo", "first"]
    assert with_us["cached pulled"] == [with_us["cached"], 2, "StableDiffusionPipeline"]
    assert with_us["cached offline"] == with_us["cached elsewhere"] == with_us["main pulled"] == with_us["cached"]
    assert without_us["cached"] == with_us["plain"] != with_us["cached"]
    assert hub.repos()["tester/cached"].private
    assert "tester/cached is not a local folder" in with_us["no token"]
    index = json.loads(hub.files("tester/cached")["model_index.json"])
    assert index["_dx_recipe"]["methods"][0]["method"] == "deepcache"
    assert {"_name_or_path", "_dx_classes"}.isdisjoint(index)


def test_one_push_is_one_commit_through_lfs(hub, sessions):
    repo = hub.repos()["tester/cached"]
    assert [repo.messages[sha] for sha in repo.commits][:2] == ["initial commit", "first"]
    files = repo.commits[repo.resolve("main")]
    assert {path for path, file in files.items() if file.lfs} == {
        path for path in files if path.endswith(".safetensors")
    }


def test_lora_files_travel_and_go(hub, sessions):
    with_us, without_us = sessions
    assert with_us["styled pulled"] == with_us["styled"] == without_us["styled"]
    assert without_us["not styled"] == with_us["plain"] != with_us["styled"]
    assert "lora/style/pytorch_lora_weights.safetensors" in hub.files("tester/cached", "styled")
    assert not [name for name in hub.files("tester/cached", "unstyled") if name.startswith("lora")]
    assert "`pipe.unfuse_lora()`" in with_us["fused"]
    assert "tester/fused" not in hub.repos()  # refused before anything was created


def test_classes_of_ours_travel(hub, sessions):
    with_us, without_us = sessions
    assert with_us["toy pulled"] == [with_us["toy"], True]
    assert without_us["toy"] == [with_us["toy"], with_us["toy"]]
    assert without_us["toy says"] == ["ToyPipeline", "toy 2", "ToyScheduler", 0.2]
    assert all(module.startswith("diffusers_modules.local") for module in without_us["toy's modules"])
    assert without_us["imported"] == []
    for message in without_us["toy untrusted"]:
        assert message.startswith("ValueError: The ")
        assert "contains custom code" in message
        assert "trust_remote_code=True" in message
    code = {name for name in hub.files("tester/toy") if name.endswith(".py")}
    assert {name.partition("_toy_")[0] for name in code} == {"pipeline", "scheduler/scheduling", "unet/modeling"}
    assert {name for name in hub.files("tester/toy", "other-scheduler") if name.endswith(".py")} < code


def test_a_branch_and_a_pull_request_leave_main_alone(hub, sessions):
    assert sessions[0]["pull request"] == "refs/pr/1"
    assert "_dx_recipe" in json.loads(hub.files("tester/open", "refs/pr/1")["model_index.json"])
    assert "_dx_recipe" not in json.loads(hub.files("tester/open")["model_index.json"])
    assert not hub.repos()["tester/open"].private


def test_cards(hub, sessions):
    assert hub.files("tester/card")["README.md"] == b"---\nlicense: mit\n---\n# Mine"
    assert "model_index.json" in hub.files("tester/card")  # `push_to_hub(pipe, "card")` goes to the user's own
    card = hub.files("tester/cached")["README.md"].decode()
    assert 'dx.Pipeline.from_pretrained("tester/cached")' in card
    assert "interval=2" in card
    card = hub.files("tester/plain")["README.md"].decode()
    assert sessions[0]["card here"]
    assert "path/to/this/folder" not in card
    assert 'dx.Pipeline.from_pretrained("tester/plain")' in card


def test_a_training_output_goes_up_without_what_is_private_or_heavy(hub, sessions):
    assert set(hub.files("tester/trained")) == {
        ".gitattributes", "picture.png", "pytorch_lora_weights.safetensors", "unet/config.json", "unet/ok.safetensors",
    }  # fmt: skip
    assert json.loads(hub.files("tester/trained")["unet/config.json"]) == {"a": [{}]}
    assert sessions[0]["config here"]  # the folder itself is not changed
    assert "'README.md' holds" in sessions[0]["leak"]
    assert "tester/leaked" not in hub.repos()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bad name", "HFValidationError: .*'a/b/c'"),
        ("no folder", "ValueError: `folder` is .* not a folder"),
        ("empty", "ValueError: `folder` is .* holds nothing to upload"),
        ("no repository", "OSError: tester/none is not a local folder and is not a valid model identifier"),
        ("no index", "OSError: tester/trained does not appear to have a file named model_index.json"),
        ("no revision", "OSError: none is not a valid git identifier"),
    ],
)
def test_errors_name_the_cause(sessions, case, message):
    assert re.match(message, sessions[0][case]), sessions[0][case]
