"""python -m tests.fuzz {reader,decoder,texts} CORPUS_FOLDER [libFuzzer's options]

atheris looks for bytes for which a property does not hold: it follows which branches of our Python
they take, and PIL's. What it finds is written to crash-… and shall become a test of its own.
"""

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pipeline", "PIL", "tarfile"]):
    from tests.fuzz import properties

from tests import corpus
from tests.store.tars import flat, tar_of


def seeds(name: str) -> list[bytes]:
    """Where the search begins."""
    if name == "decoder":
        return [*corpus.real_images().values(), *(data for data, _ in corpus.odd_images().values())]
    if name == "reader":
        tars = [data for _, data in corpus.broken_tars()]
        small = [("a.json", b"{}"), ("b.jpg", b"-"), ("é" * 80 + ".jpg", b"-")]
        return [data for data in (*tars, tar_of(*small), tar_of(*flat())) if len(data) < 40_000]
    return [data for data, _ in corpus.jsons().values() if len(data) < 40_000]


def main(name: str, folder: str, *options: str) -> None:
    warnings.simplefilter("ignore")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (Path(folder) / f"seed-{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], folder, *options], properties.PROPERTIES[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
