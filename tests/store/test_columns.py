"""Columns of json: one type for the whole run, in whatever order the samples come."""

import itertools
import json
import math

import pyarrow as pa
import pytest

from pipeline.store import columns

KINDS = ["bool", "int", "float", "str", "null", "json"]


def survey(texts):
    found = columns.Survey()
    for text in texts:
        found.add(columns.kinds(columns.parse(text)))
    return found.facts()["columns"], set(found.facts()["clashes"])


def kinds(texts):
    return survey(texts)[0]


def merged(*kinds: str) -> tuple[str, set[str]]:
    found: dict[str, str] = {}
    clashes: set[str] = set()
    for kind in kinds:
        clashes |= columns.merge(found, {"c": kind})
    return found["c"], clashes


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        (("int", "float"), "float"), (("int", "str"), "json"), (("bool", "int"), "json"),
        (("bool", "float"), "json"), (("str", "json"), "json"), (("int", "json"), "json"),
        *((("null", kind), kind) for kind in KINDS), *(((kind, kind), kind) for kind in KINDS),
    ],
)  # fmt: skip
def test_merging_two(pair, kind):
    clash = kind == "json" and set(pair) not in ({"json"}, {"json", "null"})
    for one, two in (pair, pair[::-1]):
        assert merged(one, two) == (kind, {"c"} if clash else set())


def test_the_order_of_samples_does_not_matter():
    for three in itertools.combinations_with_replacement(KINDS, 3):
        assert len({merged(*order)[0] for order in itertools.permutations(three)}) == 1


def test_kinds_of_texts():
    texts = [
        '{"i": 1, "f": 1, "s": "a", "b": true, "n": null, "l": [1], "o": {}, "clash": 1}',
        None, "{}", '{"i": 2, "f": 0.5, "n": null, "clash": "x", "late": 3}',
    ]  # fmt: skip
    assert kinds(texts) == {
        "i": "int", "f": "float", "s": "str", "b": "bool", "n": "null", "l": "json", "o": "json",
        "clash": "json", "late": "int",
    }  # fmt: skip
    assert list(kinds(texts)) == sorted(kinds(texts))


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
def test_numbers_beyond_64_bits_are_kept_as_text(number):
    assert kinds([json.dumps({"n": number})]) == {"n": "json"}
    assert columns.value(number, "json") == str(number)
    assert merged("int", "json")[0] == "json"


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63)])
def test_the_largest_that_fit(number):
    assert kinds([json.dumps({"n": number})]) == {"n": "long"}
    assert pa.array([columns.value(number, "long")], columns.TYPES["long"]).to_pylist() == [number]


def test_ids_that_a_float_cannot_hold_are_never_made_one():
    exact = 2**53
    assert merged("int", "float")[0] == "float"
    assert kinds([json.dumps({"n": n}) for n in (1, exact)]) == {"n": "int"}
    assert kinds([json.dumps({"n": n}) for n in (1, exact + 1)]) == {"n": "long"}
    clash = kinds([json.dumps({"n": n}) for n in (exact + 1, 0.5)])
    assert clash == {"n": "json"}
    assert columns.value(exact + 1, "json") == "9007199254740993"


def test_half_a_surrogate_pair_can_be_stored():
    text = r'{"cut \ud83d": "cat \ud83d", "whole": ["\ud83d\ude00", {"x": "\udc00"}]}'
    found = columns.parse(text)
    assert found == {"cut \ufffd": "cat \ufffd", "whole": ["\U0001f600", {"x": "\ufffd"}]}
    pa.array([found["cut \ufffd"]], pa.string())


def test_nan_and_infinity_are_floats():
    text = '{"a": NaN, "b": -Infinity}'
    assert kinds([text]) == {"a": "float", "b": "float"}
    raw = columns.parse(text)
    assert math.isnan(columns.value(raw["a"], "float"))
    assert columns.value(raw["b"], "float") == -math.inf


@pytest.mark.parametrize(
    ("raw", "kind", "value"),
    [
        (None, "json", None), (None, "int", None), (3, "float", 3.0), ("é", "str", "é"),
        ({"b": "é", "a": [1]}, "json", '{"a": [1], "b": "é"}'), ("x", "json", '"x"'),
        (True, "json", "true"), (True, "bool", True),
    ],
)  # fmt: skip
def test_values(raw, kind, value):
    found = columns.value(raw, kind)
    assert found == value and type(found) is type(value)


def test_whatever_came_every_value_fits_its_column():
    raws = [None, 1, 2**70, 0.5, "é", True, [1, {"a": None}], {"z": "\ud83d\ude00"}]
    for pair in itertools.product(raws, repeat=2):
        texts = [json.dumps({"c": raw}) for raw in pair]
        kind = kinds(texts)["c"]
        values = [columns.value(columns.parse(text)["c"], kind) for text in texts]
        back = pa.array(values, columns.TYPES[kind]).to_pylist()
        assert [v is None for v in back] == [raw is None for raw in pair]


def test_a_clash_between_two_samples_of_one_shard_is_told():
    texts = ['{"a": 1, "b": [1], "c": null}', '{"a": "x", "b": {}, "c": 2}']
    assert survey(texts) == ({"a": "json", "b": "json", "c": "int"}, {"a"})


def test_a_name_as_long_as_a_book_is_no_column():
    assert kinds([json.dumps({"n" * 257: 1, "n" * 256: 1})]) == {"n" * 256: "int"}


def test_names_without_nul_and_not_in_ascii():
    assert kinds(['{"a\\u0000b": 1, "größe": 2, "日本": "x"}']) == {
        "ab": "int", "größe": "int", "日本": "str",
    }  # fmt: skip


def test_a_shard_of_random_keys_does_not_make_a_million_columns():
    texts = [json.dumps({f"{i:06d}": 1 for i in range(n, n + 900)}) for n in (0, 900, 1800)]
    found = kinds(texts)
    assert list(found) == [f"{i:06d}" for i in range(columns.MAX_COLUMNS)]


def test_the_most_frequent_columns_are_kept_and_the_others_are_one_column():
    own = [{f"{n}-{i:03d}": i for i in range(900)} for n in (0, 1)]
    texts = [json.dumps({"url": "u", **each}) for each in own]
    found = columns.Survey()
    for text in texts:
        found.add(columns.kinds(columns.parse(text)))
    facts = found.facts()
    assert len(facts["columns"]) == columns.MAX_COLUMNS and facts["columns"]["url"] == "str"
    assert facts["column_counts"]["url"] == 2 and facts["columns_left_out"] == 801
    named = {**facts["columns"], columns.REST: "rest"}
    for text in texts:
        values = columns.values(columns.parse(text), named)
        rest = json.loads(values.pop(columns.REST) or "{}")
        kept = {name: value for name, value in values.items() if value is not None}
        assert kept | rest == json.loads(text) and not kept.keys() & rest.keys()
    taken = columns.parse(json.dumps({columns.REST: 1, "url": "x"}))
    assert columns.values(taken, named)[columns.REST] == '{"other_fields": 1}'
