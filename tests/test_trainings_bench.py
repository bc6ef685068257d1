"""Trainings of benchmarks: once each, with the arguments that they are given."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks._trainings import trained_once, with_task, write_lines


def test_a_training_is_run_until_it_is_finished(tmp_path):
    folder, calls = tmp_path / "made", []

    def breaks_off(argv):
        calls.append(argv)
        (folder / "checkpoint-5").mkdir(parents=True)
        raise KeyboardInterrupt

    def finishes(argv):
        calls.append(argv)
        (folder / "checkpoint-guidance").mkdir()
        (folder / "README.md").write_text("made")

    with pytest.raises(KeyboardInterrupt):
        trained_once(breaks_off, folder, {"seed": 3, "use_ema": True}, ["--center_crop"])
    for _ in range(2):
        assert trained_once(finishes, folder, {"seed": 3}) == folder
    more = [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    assert calls == [["--center_crop", "--seed=3", "--use_ema", *more], ["--seed=3", *more]]
    assert {file.name for file in folder.iterdir()} == {"README.md", "checkpoint-guidance"}, (
        "the stages of a result stay"
    )


def test_a_task_of_the_benchmark_is_trained_by_the_script(monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks._trainings.train", lambda args, task: seen.append((args, task)))
    with_task(lambda argv: argparse.Namespace(argv=argv), lambda args: ("task", args))(["--a=1"])
    assert seen == [(argparse.Namespace(argv=["--a=1"]), ("task", argparse.Namespace(argv=["--a=1"])))]


def test_lines_are_written_where_no_folder_is(tmp_path):
    file = write_lines(tmp_path / "one" / "lines.txt", ["a", "b"])
    assert file == Path(tmp_path, "one", "lines.txt") and file.read_text() == "a\nb\n"
