"""Word lists: the three that are built in, and the rules for the user's own."""

import gzip
import importlib.resources

import open_clip
import pytest

from pipeline.runtime.errors import UserError
from pipeline.vision import vocabulary


@pytest.fixture
def words_file(tmp_path):
    """Writes bytes to a file and gives its path."""

    def write(data: bytes, name: str = "words.txt") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def test_built_in_lists():
    imagenet = vocabulary.load(["imagenet"])
    assert imagenet[0] == "tench" and len(imagenet) == 998  # two names stand for two classes each
    assert len(vocabulary.load(["pico-clip"])) == 2_852
    wordnet = vocabulary.load(["wordnet"])
    assert 20_000 < len(wordnet) < 60_000
    assert {"dog", "truck", "mountain", "pizza", "German shepherd", "person"} <= set(wordnet)
    scenes = (
        "city forest wedding sunset book coin crowd village beach mountain street night concert"
    )
    assert set(scenes.split()) <= set(wordnet)
    assert not {"cannon fodder", "lame duck", "Johnny Reb", "Blucher", "A. testudineus"} & set(
        wordnet
    )
    assert not {"freedom", "Paris", "Canis familiaris", "genus Canis", "kleptomaniac"} & set(
        wordnet
    )


def test_defaults_can_be_loaded():
    assert vocabulary.default("pico-clip") == ("pico-clip",)
    assert vocabulary.default("ViT-B-32") == ("imagenet", "wordnet")
    both = vocabulary.load(vocabulary.default("ViT-B-32"))
    assert both[:998] == vocabulary.load(["imagenet"])
    assert len({word.casefold() for word in both}) == len(both)


def test_wordnet_list_says_where_it_is_from():
    folder = importlib.resources.files("pipeline.vision") / "assets" / "wordnet"
    head = (folder / "nouns.txt").read_text().splitlines()[:2]
    assert "WordNet 3.0" in head[0] and "LICENSE.txt" in head[1]
    assert "Princeton University" in (folder / "LICENSE.txt").read_text()


def test_rules_of_a_file(words_file):
    text = "\ufeff# heading\n\n  Grey   cat \r\ndog\rDOG\n  # indented\nC#\nЖ\nstraße\ngrey\tcat\nx"
    path = words_file(text.encode())
    assert vocabulary.load([path]) == ["Grey cat", "dog", "C#", "Ж", "straße", "x"]


def test_order_and_first_spelling_win_over_lists(words_file):
    one, two = words_file(b"b\nDog\n", "1.txt"), words_file(b"dog\na\nB\n", "2.txt")
    assert vocabulary.load([one, two]) == ["b", "Dog", "a"]
    assert vocabulary.load([two, one]) == ["dog", "a", "B"]


def test_urls(words_file):
    path = words_file(b"dog\n")
    assert vocabulary.load([f"file://{path}"]) == ["dog"]


def test_joiners_stay(words_file):
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert vocabulary.load([words_file(family.encode())]) == [family]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"dog\n\xff\xfe\n", ["line 2", "UTF-8", "byte 4"]),
        ("dog\r\ngroßer Hund\r\ncaf\xe9".encode("latin-1"), ["line 2", "UTF-8"]),
        (gzip.compress(b"dog\n", mtime=0), ["UTF-8"]),
        (b"# only\n\n", ["no words"]),
        (b"", ["no words"]),
        (b"dog\n" + b"x" * 201, ["line 2", "201 characters"]),
        (b"dog\ncat\nbe\x07ll\n", ["line 3", "control"]),
        ("dog\n\u202egod\n".encode(), ["line 2", "control"]),
    ],
)
def test_bad_files_are_named(words_file, data, parts):
    path = words_file(data)
    with pytest.raises(UserError) as caught:
        vocabulary.load([path])
    message = str(caught.value)
    assert all(part in message for part in [path, *parts]) and "\n" not in message


@pytest.mark.parametrize("name", ["/nowhere/words.txt", "imagnet", "nosuch://x/y.txt", "", "/"])
def test_what_cannot_be_read(name):
    with pytest.raises(UserError, match="cannot read vocabulary") as caught:
        vocabulary.load([name])
    assert repr(name) in str(caught.value) and "imagenet, wordnet, pico-clip" in str(caught.value)


def test_no_names():
    with pytest.raises(UserError, match="no vocabulary"):
        vocabulary.load([])


def test_longest_allowed(words_file):
    assert vocabulary.load([words_file(b"x" * 200)]) == ["x" * 200]


def test_imagenet_is_open_clips():
    assert set(vocabulary.load(["imagenet"])) == set(open_clip.IMAGENET_CLASSNAMES)


def test_without_a_model_there_are_no_words():
    assert vocabulary.load_or_default((), "") == []
    with pytest.raises(UserError, match=r"'pico-clip'.* set embeddings.model, or leave"):
        vocabulary.load_or_default(("pico-clip",), "")
