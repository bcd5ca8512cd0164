"""How near two nouns are in WordNet: path similarity, as its users know it.

reads   kinds.txt.gz    a line per meaning: its words, the lines above it
"""

import gzip
from functools import cache
from pathlib import Path

from pipeline.caption import tokenization

Kinds = tuple[
    dict[tokenization.Key, list[int]], list[list[int]]
]  # senses of a word; what is above each


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
    """The meanings of a noun; of a phrase that WordNet does not know, of its longest known end.

    In English that is its head: of "tabby cat in a box" none, of "a wet tabby cat" tabby cat.
    """
    words, known = tokenization.key(phrase), _kinds()[0]
    ends = (words[start:] for start in range(len(words)))
    return next((known[end] for end in ends if end in known), [])


def path_similarity(one: str, other: str) -> float | None:
    """1 / (1 + steps from one to the other, up and down the kinds); None for an unknown noun.

    Of all their meanings the two that are nearest: 1 for words of one meaning, 1/2 for a kind and
    what it is a kind of.
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
    """All that a meaning is a kind of, itself first, and the fewest steps to each."""
    above, steps, todo = _kinds()[1], {sense: 0}, [sense]
    for kind in todo:  # by the number of steps, since what is found is put at the end
        for upper in above[kind]:
            if upper not in steps:
                steps[upper] = steps[kind] + 1
                todo.append(upper)
    return steps
