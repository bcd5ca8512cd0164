"""Path similarity of two nouns in WordNet.

reads   kinds.txt.gz    one line per meaning: its words | line numbers of its hypernyms
"""

import gzip
from functools import cache
from pathlib import Path

from pipeline.caption import tokenization

Kinds = tuple[
    dict[tokenization.Key, list[int]], list[list[int]]
]  # senses of a word; hypernyms of each sense


@cache
def _kinds() -> Kinds:
    data = Path(__file__).with_name("kinds.txt.gz")
    senses: dict[tokenization.Key, list[int]] = {}
    above: list[list[int]] = []
    for number, line in enumerate(gzip.decompress(data.read_bytes()).decode("ascii").splitlines()):
        words, _, kinds = line.partition("|")
        for word in words.split(","):
            senses.setdefault(tokenization.key(word), []).append(number)
        above.append([int(kind) for kind in kinds.split()])
    return senses, above


def senses(phrase: str) -> list[int]:
    """The meanings of a noun; for an unknown phrase those of its longest known end.

    In English that is its head: of "tabby cat in a box" none, of "a wet tabby cat" tabby cat.
    """
    words, known = tokenization.key(phrase), _kinds()[0]
    ends = (words[start:] for start in range(len(words)))
    return next((known[end] for end in ends if end in known), [])


def path_similarity(one: str, other: str) -> float | None:
    """1 / (1 + steps from one noun to the other via hypernyms); None for an unknown noun.

    The nearest two of all their meanings count: 1 for synonyms, 1/2 for a noun and its hypernym.
    """
    ways = [_steps_up(sense) for sense in senses(one)]
    others = [_steps_up(sense) for sense in senses(other)]
    steps = [
        own[kind] + theirs[kind]
        for own in ways
        for theirs in others
        for kind in own.keys() & theirs
    ]
    return 1 / (1 + min(steps)) if steps else None


def _steps_up(sense: int) -> dict[int, int]:
    """A meaning and all its hypernyms, with the fewest steps to each."""
    above, steps, todo = _kinds()[1], {sense: 0}, [sense]
    for kind in todo:  # breadth first: new hypernyms are appended
        for upper in above[kind]:
            if upper not in steps:
                steps[upper] = steps[kind] + 1
                todo.append(upper)
    return steps
