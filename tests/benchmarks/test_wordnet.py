"""Path similarity as WordNet's users know it; the expected values are NLTK's for WordNet 3.0."""

import pytest

from benchmarks import wordnet


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [
        ("dog", "dog", 0),
        ("car", "automobile", 0),  # one meaning
        ("dog", "domestic animal", 1),
        ("poodle", "dog", 1),
        ("cat", "dog", 4),  # feline, carnivore, canine
        ("truck", "car", 2),  # motor vehicle
        ("flags", "flag", 0),
    ],
)
def test_similarity_is_one_over_the_steps_and_one(one, other, steps):
    assert wordnet.path_similarity(one, other) == pytest.approx(1 / (1 + steps))
    assert wordnet.path_similarity(other, one) == wordnet.path_similarity(one, other)


def test_a_phrase_that_is_not_known_stands_for_its_end():
    assert wordnet.senses("wet tabby cats") == wordnet.senses("tabby cat") != []
    assert wordnet.senses("Sweet_Pepper") == wordnet.senses("sweet pepper") != []


def test_unknown_words_have_no_similarity():
    assert wordnet.path_similarity("zorgmobile", "car") is None
    assert wordnet.path_similarity("小狗", "dog") is None
    assert wordnet.path_similarity("", "dog") is None


def test_all_meanings_hang_together():
    """Every meaning but the uppermost, and 14 that stand below single persons and places, has
    kinds above it, which stand in the list.
    """
    _, above = wordnet._kinds()
    alone = [number for number, kinds in enumerate(above) if not kinds]
    assert len(above) == 74_385 and alone[0] == 0 and len(alone) == 15
    assert all(0 <= kind < len(above) for kinds in above for kind in kinds)
