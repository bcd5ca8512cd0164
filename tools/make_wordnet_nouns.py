"""Make pipeline/vision/assets/wordnet/: the nouns that can be seen, and what is a kind of what.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb unpacked
    python tools/make_wordnet_nouns.py unpacked > pipeline/vision/assets/wordnet/nouns.txt
    python tools/make_wordnet_nouns.py unpacked kinds | gzip -9n > benchmarks/kinds.txt.gz

Reads data.noun, index.noun and cntlist.rev (formats: man 5 wndb, cntlist) of Debian's package, made
with 1:3.0-37. Prints the list on the standard output and, on the other, how many words each rule
dropped. A word is kept when one of its senses in use (`senses_in_use`) lies in a concrete
lexicographer file or below a scene, and no rule of `reason_to_drop` speaks against it. The same
input gives the same bytes.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CONCRETE = {  # lexicographer file → why it is in; possession is out: sums and gains, not things
    5: "animal",
    6: "artifact",
    8: "body",
    13: "food",
    15: "location",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    27: "substance",
}
PERSON, SUBSTANCE = 18, 27
FIRST_SENSE_ONLY = {PERSON, SUBSTANCE}  # their later senses are figures of speech: rock, gold
SENSES = 3  # of a word that may make it one for a picture
MIN_USE = (
    8  # a later sense makes at least one in so many of the word's uses, where they were counted
)

# Of files of which most cannot be seen, what can: file, and the word above all of them.
SCENES = {
    (4, "athletics"), (4, "dance"), (11, "celebration"), (11, "ceremony"), (11, "contest"),
    (11, "explosion"), (11, "fire"), (14, "animal group"), (14, "crowd"), (14, "parade"),
    (14, "musical organization"), (14, "vegetation"), (21, "currency"),
}  # fmt: skip

# The words above all others are in a file of their own, `Tops`, among words nobody can see; the
# plain words for people are kept by name, and the kinds that WordNet puts below them are not.
KEEP = {
    "person", "animal", "plant", "food", "ox", "adult", "baby", "boy", "bride", "bridegroom",
    "child", "girl", "man", "old man", "old woman", "schoolboy", "schoolgirl", "student",
    "teenager", "toddler", "tourist", "woman",
    # scenes that stand alone in a file of what cannot be seen
    "autumn", "concert", "dawn", "dusk", "family", "market", "night", "noon", "picnic", "spring",
    "summer", "sunrise", "winter",
}  # fmt: skip

# Of other people, only what work, sport, stage, altar and uniform show. The rest of the file judges
# people (fool, failure, kleptomaniac), and a label must not.
VISIBLE_PEOPLE = {
    "acrobat", "artist", "athlete", "clergyman", "craftsman", "driver", "farmer", "farmhand",
    "fireman", "fisherman", "football_player", "health_professional", "lawman", "musician",
    "performer", "photographer", "policeman", "rider", "sailor", "salesperson", "serviceman",
    "skilled_worker", "teacher", "workman",
}  # fmt: skip
# What those still hold of judgement.
HIDDEN_PEOPLE = {
    "bad_person", "cannon_fodder", "convict", "criminal", "deviate", "failure", "goldbrick",
    "incumbent", "joker", "lame_duck", "narc", "persona_grata", "persona_non_grata", "prostitute",
    "sensualist", "speeder", "stuffer", "trustbuster",
    "slave", "stripper", "terrorist", "unfortunate", "unpleasant_person", "wrongdoer",
}  # fmt: skip
NOT_THINGS = {"taxonomic_group", "cell_organelle", "chemical_element", "hormone", "enzyme"}
INSULTS = {"obscenity", "ethnic_slur", "disparagement"}  # WordNet's marks on how a word is used
INSULT_NOTE = re.compile(r"obscen|offensive|slur\b|vulgar|disparag|derogat|pejorat|contempt", re.I)
INFORMAL_NOTE = re.compile(r"slang|informal|colloquial|humorous|jocular|nickname|believed to", re.I)
SEXUAL_NOTE = re.compile(r"sexual|intercourse|prostitut|masturbat|erotic|coitus|genital", re.I)
RUDE = re.compile(
    r"\b(arse|arsehole|ass|asshole|bastard|bitch|bollocks?|boobs?|bugger|bum|butt|cock|crap|cunt|"
    r"dick|fag|fanny|fart|gypsy|hooker|hottentot|knocker|nazi|negress|negro|pecker|piss|prick|"
    r"pussy|savage|shit|slut|snot|squaw|tits?|titties|turd|whore|anus|anal|rect(al|um)|hymen|"
    r"clitor\w*|penis|penile|scrot\w*|semen|sperm\w*|testic\w*|testis|vagin\w*|vulva\w*)\b",
    re.I,
)
LATIN_ANATOMY = re.compile(
    r"^(arteria|cartilago|fissura|glandula|ligamentum|musculus|nervus|os|sulcus|valva|valvula|vena)"
    r" ",
    re.I,
)
RANKED = re.compile(
    r"^(?:genus|subgenus|tribe|family|subfamily|superfamily|order|suborder|superorder|class|"
    r"subclass|phylum|subphylum|superclass|division) ([A-Z][a-z]+)$"
)
SHORT_TAXON = re.compile(r"^[A-Z]\. [a-z]+$")  # A. testudineus
SHAPE = re.compile(r"^[A-Za-z][A-Za-z' .-]+$")  # no digits, no leading signs


@dataclass(frozen=True)
class Synset:
    """One line of data.noun: words of one meaning, and its pointers (symbol, offset)."""

    file: int
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]
    gloss: str

    def to(self, *symbols: str) -> Iterator[str]:
        return (offset for symbol, offset in self.pointers if symbol in symbols)


def read_synsets(path: Path) -> dict[str, Synset]:
    synsets = {}
    for line in data_lines(path):
        fields, gloss = line.split(" | ", 1)
        head = fields.split()
        count = int(head[3], 16)
        words = tuple(w.replace("_", " ") for w in head[4 : 4 + 2 * count : 2])
        rest = head[5 + 2 * count :]  # after the number of pointers: symbol, offset, part, source
        pointers = tuple(zip(rest[0::4], rest[1::4], strict=False))
        synsets[head[0]] = Synset(int(head[1]), words, pointers, gloss.strip())
    return synsets


def read_senses(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(word in lower case, offsets of its noun senses, the most frequent first)."""
    for line in data_lines(path):
        fields = line.split()
        yield fields[0].replace("_", " "), fields[6 + int(fields[3]) :]


def read_counts(path: Path) -> dict[tuple[str, int], int]:
    """(word in lower case, number of a noun sense) → how often WordNet's makers met it in texts."""
    counts = {}
    for line in path.read_text(encoding="ascii").splitlines():
        key, sense, count = line.split()
        word, _, kind = key.partition("%")
        if kind.startswith("1:"):
            counts[word.replace("_", " "), int(sense)] = int(count)
    return counts


def senses_in_use(
    word: str, offsets: list[str], counts: dict[tuple[str, int], int]
) -> Iterator[str]:
    """The first sense, and of the next those that are common enough; all where none was counted."""
    total = sum(counts.get((word, n), 0) for n in range(1, len(offsets) + 1))
    for number, offset in enumerate(offsets[:SENSES], start=1):
        if number == 1 or MIN_USE * counts.get((word, number), 0) >= total:
            yield offset


def data_lines(path: Path) -> Iterator[str]:
    """Lines but the licence, which is indented by two spaces."""
    for line in path.read_text(encoding="ascii").splitlines():
        if not line.startswith("  "):
            yield line


def below(synsets: dict[str, Synset], roots: Iterable[str]) -> set[str]:
    """Offsets of the nouns named `roots` and of all kinds of them, by every path."""
    names = {root.replace("_", " ") for root in roots}
    people = {n for n in names if any(n in s.words and s.file == PERSON for s in synsets.values())}
    return kinds_of(
        synsets,
        (
            offset
            for offset, s in synsets.items()
            if (names - people) & set(s.words) or (s.file == PERSON and people & set(s.words))
        ),
    )


def kinds_of(synsets: dict[str, Synset], roots: Iterable[str]) -> set[str]:
    """The offsets `roots` and those of all kinds of them, by every path."""
    todo = list(roots)
    found: set[str] = set()
    while todo:
        offset = todo.pop()
        if offset not in found:
            found.add(offset)
            todo.extend(synsets[offset].to("~", "~i"))
    return found


class Rules:
    """Sets made once from the whole of WordNet, and the verdict on a word."""

    def __init__(self, synsets: dict[str, Synset]) -> None:
        self.not_things = below(synsets, NOT_THINGS)
        scenes = (o for o, s in synsets.items() if SCENES & {(s.file, w) for w in s.words})
        self.scenes = kinds_of(synsets, scenes)
        self.people = below(synsets, VISIBLE_PEOPLE) - below(synsets, HIDDEN_PEOPLE)
        self.insults = {o for o, s in synsets.items() if INSULTS & {*underscored(s.words)}}
        matches = (RANKED.match(word) for s in synsets.values() for word in s.words)
        self.taxa = {m.group(1) for m in matches if m}

    def reason_to_drop(self, word: str, offset: str, sense: Synset) -> str | None:
        if sense.file not in CONCRETE and offset not in self.scenes:
            return "not concrete"
        if next(sense.to("@i"), None):
            return "single instance"
        if offset in self.not_things or word.split()[0] in self.taxa or SHORT_TAXON.match(word):
            return "taxon, chemical element or the like"
        if sense.file == PERSON and offset not in self.people:
            return "person not known by sight"
        if sense.file == PERSON and (INFORMAL_NOTE.search(sense.gloss) or word != word.lower()):
            return "nickname or proper name of a person"
        if not SHAPE.match(word) or len(word) < 3 or LATIN_ANATOMY.match(word):
            return "no plain word"
        return "rude" if self.is_rude(word, sense) else None

    def is_rude(self, word: str, sense: Synset) -> bool:
        noted = INSULT_NOTE.search(sense.gloss) or SEXUAL_NOTE.search(sense.gloss)
        return bool(noted or RUDE.search(word) or self.insults & set(sense.to(";u")))


def underscored(words: Iterable[str]) -> Iterator[str]:
    return (word.replace(" ", "_") for word in words)


def select(folder: Path) -> tuple[list[str], Counter[str]]:
    """(the words kept, sorted; how many each rule dropped)."""
    synsets = read_synsets(folder / "data.noun")
    rules = Rules(synsets)
    counts = read_counts(folder / "cntlist.rev")
    kept, dropped = set(KEEP), Counter[str]()
    for lemma, offsets in read_senses(folder / "index.noun"):
        reasons = []
        for offset in senses_in_use(lemma, offsets, counts):
            sense = synsets[offset]
            if reasons and sense.file in FIRST_SENSE_ONLY:
                continue
            word = next(w for w in sense.words if w.lower() == lemma)
            reasons.append(rules.reason_to_drop(word, offset, sense))
            if reasons[-1] is None:
                kept.add(word)
                break
        if reasons[-1] is not None:
            dropped[reasons[0]] += 1
    return sorted(kept, key=lambda w: (w.casefold(), w)), dropped


def kinds(synsets: dict[str, Synset]) -> Iterator[str]:
    """A line per meaning, but of single persons and places: its words, and the lines above it."""
    kept = sorted(offset for offset, s in synsets.items() if not any(s.to("@i")))
    line_of = {offset: number for number, offset in enumerate(kept)}
    for offset in kept:
        above = (str(line_of[up]) for up in synsets[offset].to("@") if up in line_of)
        yield ",".join(word.lower() for word in synsets[offset].words) + "|" + " ".join(above)


def main() -> None:
    unpacked, *what = sys.argv[1:] or sys.exit(__doc__)
    if what == ["kinds"]:
        print("\n".join(kinds(read_synsets(Path(unpacked) / "usr/share/wordnet/data.noun"))))
        return
    words, dropped = select(Path(unpacked) / "usr/share/wordnet")
    print("# Nouns that can be seen in a picture, from WordNet 3.0 (Debian wordnet-base 1:3.0-37).")
    print("# WordNet 3.0 Copyright 2006 by Princeton University. Licence: LICENSE.txt beside this.")
    print("# Made by tools/make_wordnet_nouns.py; the rules are in README.md.")
    print("\n".join(words))
    for reason, count in dropped.most_common():
        print(f"{count:7,} dropped: {reason}", file=sys.stderr)
    print(f"{len(words):7,} kept", file=sys.stderr)


if __name__ == "__main__":
    main()
