"""Words in any script; what says the same, and what holds what."""

import unicodedata

import pytest

from pipeline.caption import tokenization


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("T-shirt_red, the Dog’s", ["t-shirt", "red", "the", "dog’s"]),
        ("Ein GROẞER Hund", ["ein", "großer", "hund"]),
        ("كلبٌ صغير، جميل", ["كلبٌ", "صغير", "جميل"]),  # a mark on a letter, an Arabic comma
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("แมวน่ารัก กิน", ["แมวน่ารัก", "กิน"]),
        ("می‌خواهم", ["می‌خواهم"]),  # with a zero-width non-joiner inside
        ("赤い車のＰｈｏｔｏ", ["赤", "い", "車", "の", "photo"]),
        ("ﾈｺとネコ", ["ネコ", "と", "ネコ"]),
        ("e\u0301te\u0301", ["été"]),
        ("🙂 — _ !", []),
    ],
)
def test_words(text, words):
    assert tokenization.words(text) == [unicodedata.normalize("NFKC", word) for word in words]


def test_ascii_goes_the_same_way():
    text = "T-shirt's_red -- 'a' B2B, x-'y' 3.5 rock'n'roll\t(co-op)"
    assert tokenization.words(text) == tokenization._pattern().findall(text.lower())


SAME = """flag flags, bus buses, box boxes, dish dishes, horse horses, cherry cherries,
glass glasses, cookie cookies, wolf wolves, knife knives, potato potatoes, shoe shoes, woman women,
pie pies, glove gloves, house houses, Sweet_Pepper sweet-peppers"""
OTHER = "car care, plan plane, cap cape, bus bush, glass glad, pin pine, cat caterpillar"


@pytest.mark.parametrize("pair", SAME.split(","))
def test_plural_forms_are_one(pair):
    one, many = (tokenization.key(text.replace("-", " ")) for text in pair.split())
    assert one == many


@pytest.mark.parametrize("pair", OTHER.split(","))
def test_other_words_are_not(pair):
    one, other = map(tokenization.key, pair.split())
    assert one != other and not tokenization.holds(other, one)


@pytest.mark.parametrize(
    ("text", "phrase", "held"),
    [
        ("red flag", "flags", True),
        ("Flags of the world", "flag", True),
        ("red flag", "red flag", True),
        ("flag", "red flag", False),
        ("red big flag", "red flag", False),
        ("caterpillar", "cat", False),
        ("小狗的照片", "小狗", True),
        ("ネコ", "犬", False),
        ("flag", "", True),
    ],
)
def test_holds(text, phrase, held):
    assert tokenization.holds(tokenization.key(text), tokenization.key(phrase)) is held


def test_says_any_is_holds_of_any():
    names = {tokenization.key(name) for name in ("cat", "pickup truck")}
    texts = ["cat", "wet cats", "pickup trucks", "truck", "pickup", "blue pickup truck", "dog"]
    message = [tokenization.says_any(tokenization.key(text), names) for text in texts]
    assert message == [
        any(tokenization.holds(tokenization.key(t), n) for n in names) for t in texts
    ]
    assert message == [True, True, True, False, False, True, False]


def test_words_that_never_end_a_name_only_modify():
    names = ["large circle", "Small circles", "right arrow", "turn right", "large", "…"]
    assert tokenization.only_modify(names) == {"small", "turn"}
    assert tokenization.only_modify(names[:4]) == {"large", "small", "turn"}
    assert tokenization.only_modify([]) == set()
