"""Word lists for cluster names: ImageNet, WordNet, pico-clip's, or a file of the user."""

import importlib.resources
import re
from collections.abc import Iterator, Sequence

import fsspec

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import resolved

MAX_CHARACTERS = 200  # of one word or phrase; a longer line shows that the file is no word list

_ASSETS = {"wordnet": "wordnet/nouns.txt", "pico-clip": "pico-clip/vocabulary.txt"}
LINES = re.compile(r"\r\n|\r|\n")
JOINERS = "\u200c\u200d"  # zero-width, part of the spelling in Persian, in Indic scripts, in emoji


def default(model: str) -> tuple[str, ...]:
    """Names of the default vocabularies of a model."""
    return ("pico-clip",) if model == "pico-clip" else ("imagenet", "wordnet")


def load_or_default(names: Sequence[str], model: str) -> list[str]:
    """The words of `names`, or of `default(model)` if there are none; raises as `load` does.

    None without a model, as of given embeddings: nothing could compare them with images.
    """
    if model:
        return load(names or default(model))
    if names:
        raise UserError(
            f"vocabulary {list(names)} needs a model that encodes texts as the given embeddings: "
            "set embeddings.model, or leave the vocabulary out"
        )
    return []


def load(names: Sequence[str]) -> list[str]:
    """Words of all vocabularies in order; words that differ only in case appear once.

    A name is imagenet, wordnet, pico-clip, or the path or URL of a text file: one word or phrase
    per line, UTF-8, empty lines and lines that start with # skipped. Raises UserError.
    """
    if not names:
        raise UserError(f"no vocabulary is named; name one of {_known()} or a text file")
    words: dict[str, str] = {}
    for name in names:
        for word in _words(name):
            words.setdefault(word.casefold(), word)
    return list(words.values())


def _words(name: str) -> list[str]:
    if name == "imagenet":
        import open_clip  # as in `weights`: where it is needed

        return list(open_clip.IMAGENET_CLASSNAMES)
    words = list(_parse(name, _text(name)))
    if not words:
        raise UserError(f"vocabulary {name} has no words; write one word or phrase per line")
    return words


def _text(name: str) -> str:
    try:
        return _read(name).decode("utf-8-sig")
    except UserError:
        raise
    except UnicodeDecodeError as error:
        line = len(LINES.split(error.object[: error.start].decode("utf-8-sig")))
        raise UserError(
            f"vocabulary {name}, line {line}: not UTF-8 (byte {error.start} of the file); convert "
            "the file to UTF-8"
        ) from error
    except (OSError, ValueError, ImportError) as error:  # no such file, protocol, or its package
        raise UserError(
            f"cannot read vocabulary {name!r} ({type(error).__name__}: {error}); "
            f"name one of {_known()} or a text file"
        ) from error


def _read(name: str) -> bytes:
    if name in _ASSETS:
        return (
            importlib.resources.files("pipeline.vision") / "assets" / _ASSETS[name]
        ).read_bytes()
    with fsspec.open(resolved(name), "rb") as file:
        data: bytes = file.read()
    return data


def _parse(name: str, text: str) -> Iterator[str]:
    """Words of a text, with white space normalised. Raises UserError with the line number."""
    for number, line in enumerate(LINES.split(text), start=1):
        word = " ".join(line.split())
        if not word or word.startswith("#"):
            continue
        if len(word) > MAX_CHARACTERS:
            raise UserError(
                f"vocabulary {name}, line {number}: {len(word)} characters; "
                f"write one word or phrase of at most {MAX_CHARACTERS} per line"
            )
        if not all(c.isprintable() or c in JOINERS for c in word):
            raise UserError(f"vocabulary {name}, line {number}: control character; remove it")
        yield word


def _known() -> str:
    return ", ".join(("imagenet", *_ASSETS))
