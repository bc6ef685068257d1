"""Texts for the scripts that train language models: windows that start at a line, drawn in the common order."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset


class TextWindows(Dataset):
    """Token windows of documents, one for each line: from the line's start on, over the lines that follow it.

    A window that reaches the end of its document is filled with the end-of-text token, which is so learnt as what
    follows a finished text (Nie et al. 2025, section 2.3, pad answers in the same way).

    Args:
        documents: texts; lines matter only as places where windows start.
        tokenizer: a fast tokenizer with an end-of-text token; no special tokens are added by it.
        length: tokens a window.

    Items are `{"input_ids": (length,) int64, "index", "sample_id"}`.
    """

    def __init__(self, documents: list[str], tokenizer, length: int):
        if length < 1:
            raise ValueError(f"`length` is {length}; it must be at least 1.")
        if tokenizer.eos_token_id is None:
            raise ValueError("`tokenizer` has no end-of-text token (`eos_token`), which ends a document.")
        starts, pieces, position = [], [], 0
        tail = [tokenizer.eos_token_id] * length
        for document in documents:
            lines = [line + "\n" for line in document.strip().split("\n")]
            lines[-1] = lines[-1].removesuffix("\n")
            for ids in tokenizer(lines, add_special_tokens=False).input_ids:
                starts.append(position)
                pieces.append(torch.tensor(ids, dtype=torch.int32))
                position += len(ids)
            pieces.append(torch.tensor(tail, dtype=torch.int32))
            position += length
        if not any(len(piece) for piece in pieces[:-1]):
            raise ValueError("The training data holds no text.")
        self.tokens, self.starts, self.length = torch.cat(pieces), starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item if isinstance(item, tuple) else (item, item)
        start = self.starts[index]
        window = self.tokens[start : start + self.length].long()
        return {"input_ids": window, "index": index, "sample_id": sample_id}


def add_text_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_data_dir", help="A .txt file or a folder of them, each a document, or .jsonl with one a line."
    )
    data.add_argument("--dataset_name", help="Data set of the Hub or a local one, for the `datasets` package.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--cache_dir")
    data.add_argument("--text_column", default="text")
    data.add_argument("--max_seq_length", type=int, default=512, help="Tokens a window.")
    return parser


def load_documents(args: argparse.Namespace) -> list[str]:
    """The documents that `--train_data_dir` or `--dataset_name` names.

    Raises:
        ValueError: there is nothing there, or no column `--text_column`.
    """
    if args.dataset_name is not None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "`--dataset_name` needs the `datasets` package: pip install 'diffusers_ext[train]'"
            ) from error
        rows = datasets.load_dataset(
            args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train"
        )
        if args.text_column not in rows.column_names:
            raise ValueError(f"`--text_column` is {args.text_column!r}, which is none of {rows.column_names}.")
        return [str(text) for text in rows[args.text_column]]
    path = Path(args.train_data_dir)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix in (".txt", ".jsonl") for file in files):
        raise ValueError(f"`--train_data_dir` is {str(path)!r}, which is no .txt or .jsonl file or folder of .txt.")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(args.text_column not in row for row in rows):
            raise ValueError(f"Every line of {path} needs {args.text_column!r}; at least one has none.")
        return [row[args.text_column] for row in rows]
    return [file.read_text(encoding="utf-8") for file in files]
