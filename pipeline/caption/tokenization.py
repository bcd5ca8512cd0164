"""Words of captions and alt texts in any script, and whether two texts have the same words.

Han and Kana have no spaces: a run of one of these scripts is one word, compared by its characters.
Text in Thai, Lao, Khmer and Burmese is split at spaces only. Plural rules are English; they do not
change words of other scripts.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache

from pipeline.vision.vocabulary import JOINERS

HAN = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
HIRAGANA = "\u3041-\u309f"
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff"
SPACELESS = re.compile(f"[{HAN}{HIRAGANA}{KATAKANA}]")
ASCII = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")  # the same words as `_pattern`, faster
SIBILANTS = ("s", "x", "z", "ch", "sh")

Key = tuple[str, ...]  # of a caption: its words without plural endings, or its characters


@cache
def _pattern() -> re.Pattern[str]:
    """A word: letters, digits and the marks on them, hyphens and apostrophes inside.

    Python's `\\w` has no combining marks; without them words of Hindi and Thai would be split.
    """
    marks = (c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
    letter = rf"[^\W_{HAN}{HIRAGANA}{KATAKANA}]"
    word = f"{letter}+[{re.escape(''.join(marks))}{JOINERS}]*"
    return re.compile(
        f"(?:{word})+(?:['’-](?:{word})+)*|[{HAN}]+|[{HIRAGANA}]+|[{KATAKANA}]+", re.UNICODE
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case; a run of Han, Hiragana or Katakana is one word.

    NFKC unifies compatible forms: full-width letters, half-width Katakana, ligatures.
    """
    if text.isascii():
        return ASCII.findall(text.lower())
    found: list[str] = _pattern().findall(unicodedata.normalize("NFKC", text).lower())
    return found


def key(text: str) -> Key:
    """The form in which texts are compared: equal if two differ only in case and plural."""
    units: list[str] = []
    for word in words(text):
        units += word if SPACELESS.match(word) else [singular(word)]
    return tuple(units)


def singular(word: str) -> str:
    """The word without an English plural ending; for comparison, not for display.

    The S-stemmer (Harman 1991). In addition, one form for -s and -es after sibilants (bus, box),
    -y and -ies, -f and -ves, -o and -oes, -man and -men. Irregular plurals stay as they are.
    """
    if word.endswith("men"):
        return f"{word[:-3]}man"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending, one in (("ie", "i"), ("y", "i"), ("ve", "f"), ("fe", "f"), ("oe", "o")):
        if len(word) > 3 and word.endswith(ending):
            return word.removesuffix(ending) + one
    if len(word) > 3 and word.endswith(tuple(f"{sound}e" for sound in SIBILANTS)):
        return word[:-1]
    return word


def phrases(of: Key) -> Iterator[Key]:
    """All runs of words of a key, including the whole key."""
    for start in range(len(of)):
        for stop in range(start + 1, len(of) + 1):
            yield of[start:stop]


def holds(text: Key, phrase: Key) -> bool:
    """Whether the text contains the words of the phrase, one after the other."""
    size = len(phrase)
    return any(text[start : start + size] == phrase for start in range(len(text) - size + 1))


def says_any(text: Key, names: Collection[Key]) -> bool:
    """Whether the text is one of the names, or holds one among more words."""
    return any(phrase in names for phrase in phrases(text))


def only_modify(names: Collection[str]) -> set[str]:
    """Words that stand before others in the names, and never last: "large" of "large circle".

    In English the last word of a name says what a thing is, and those before it say how it is.
    """
    keys = [of for name in names if (of := key(name))]
    return {word for of in keys for word in of[:-1]} - {of[-1] for of in keys}
