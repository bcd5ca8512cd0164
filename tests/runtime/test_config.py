"""Configuration: what a TOML file and --set may say, and the messages about mistakes."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.cli import options
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.select_k import settings as select_k_settings
from pipeline.train import settings as train_settings


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One setting of each type."""

    name: str = setting("pico", "a name")
    size: int = setting(64, "things")
    rate: float = setting(0.5, "0 to 1")
    wet: bool = setting(False, "or dry")
    words: tuple[str, ...] = setting((), "any number")
    limit: int | None = setting(None, "things; none: all")
    actors: int = setting(1, "processes", operational=True)


@dataclass(frozen=True, kw_only=True)
class Other:
    """Of another stage."""

    name: str = setting("x", "a name")


KINDS = {"kind": Kind, "other_stage": Other}


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and gives its path."""

    def write(text: str) -> str:
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.toml")

    return write


def load(*sets: str, path: str | None = None) -> Kind:
    return config.load(KINDS, path, sets)["kind"]


def test_nothing_said_is_all_defaults():
    assert config.load(KINDS, None) == {"kind": Kind(), "other_stage": Other()}


def test_a_file_fills_its_sections(toml):
    path = toml(
        '[kind]\nname = "ünï"\nsize = 7\nrate = 0.25\nwet = true\nwords = ["a", "b"]\nlimit = 3\n'
        '[other_stage]\nname = "y"\n'
    )
    found = config.load(KINDS, path)
    kind = Kind(name="ünï", size=7, rate=0.25, wet=True, words=("a", "b"), limit=3)
    assert found == {"kind": kind, "other_stage": Other(name="y")}


def test_overrides_win_over_the_file_and_the_last_over_the_first(toml):
    path = toml("[kind]\nsize = 7\nrate = 0.25\n")
    found = load("kind.size=8", "kind.size = 9", "kind.name=ViT-B-32", path=path)
    assert found == Kind(size=9, rate=0.25, name="ViT-B-32")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("kind.rate=1", "rate", 1.0), ("kind.words=cat", "words", ("cat",)),
        ('kind.words=["a", "b"]', "words", ("a", "b")), ("kind.words=[]", "words", ()),
        ("kind.name=a=b", "name", "a=b"), ('kind.name="7"', "name", "7"),
        ("kind.name=s3://b/k.toml", "name", "s3://b/k.toml"), ("kind.name=", "name", ""),
        ("kind.wet=true", "wet", True), ("kind.size=-1_000", "size", -1000),
        ("kind.limit=5", "limit", 5),
    ],
)  # fmt: skip
def test_values_are_cast_to_the_type_of_the_setting(text, key, value):
    found = getattr(load(text), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind.size=1.0", "kind.size = 1.0: give a whole number"),
        ("kind.size=true", "kind.size = True: give a whole number"),
        ("kind.rate=true", "kind.rate = True: give a number"),
        ("kind.rate=much", "kind.rate = 'much': give a number"),
        ("kind.rate=nan", "kind.rate = nan: give a finite number"),
        ("kind.rate=-inf", "kind.rate = -inf: give a finite number"),
        ("kind.wet=1", "kind.wet = 1: give true or false"),
        ("kind.name=7", "kind.name = 7: give a text"),
        ("kind.words=[1]", "kind.words = 1: give a text"),
        ("kind.limit=all", "kind.limit = 'all': give a whole number"),
        ("kind.siez=1", "unknown setting kind.siez; did you mean size?"),
        ("kind.qqqq=1", "unknown setting kind.qqqq; known: actors, limit, name"),
        ("other.name=x", "--set other.name=x: unknown section other; did you mean other_stage?"),
        ("zzz.name=x", "unknown section zzz; known: kind, other_stage"),
        ("kind.size", "--set kind.size: write it as section.key=value"),
        ("size=7", "--set size=7: write it as section.key=value"),
        ("=", "--set =: write it as section.key=value"),
    ],
)
def test_mistakes_in_overrides_are_named_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        load(text)
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kinds]\nsize = 1", r"unknown section \[kinds\]; did you mean kind\?"),
        ("[kind]\nsizes = 1", r"unknown setting kind\.sizes; did you mean size\?"),
        ("size = 1\n[kind]", "run.toml: size is outside a section"),
        ("[kind]\nsize = x", r"run\.toml is not valid TOML: .*line 2"),
        ("[kind]\nsize = 1\nsize = 2", "not valid TOML"),
    ],
)
def test_mistakes_in_files_are_named(toml, text, message):
    with pytest.raises(UserError, match=message):
        load(path=toml(text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml cannot be read: No such file.*--config"):
        load(path=str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(path=str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b'[kind]\nname = "caf\xe9"')
    with pytest.raises(UserError, match="not valid TOML"):
        load(path=str(tmp_path / "latin.toml"))


def test_the_fingerprint_changes_with_all_that_matters_and_nothing_else():
    base = config.fingerprint(Kind(), "upstream")
    assert base == config.fingerprint(Kind(actors=9), "upstream")
    changes = {"name": "y", "size": 1, "rate": 0.1, "wet": True, "words": ("a",), "limit": 1}
    others = {config.fingerprint(replace(Kind(), **{k: v}), "upstream") for k, v in changes.items()}
    others |= {config.fingerprint(Kind()), config.fingerprint(Kind(), "upstream", "more")}
    assert len(others) == len(changes) + 2 and base not in others
    assert len(base) == 12 and set(base) <= set("0123456789abcdef")


def test_a_fingerprint_does_not_depend_on_the_process():
    text = (
        '[{"limit": null, "name": "pico", "rate": 0.5, "size": 64, "wet": false, '
        '"words": ["a", "\\u00e9"]}, {"a": [2], "b": 1}]'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert config.fingerprint(Kind(words=("a", "é")), {"b": 1, "a": [2]}) == expected


def test_facts_leave_operational_settings_out_and_are_json():
    facts = config.facts(Kind(words=("a",)))
    assert facts == {
        "name": "pico", "size": 64, "rate": 0.5, "wet": False, "words": ["a"], "limit": None,
    }  # fmt: skip


def test_differences_name_what_changed_only():
    before = config.facts(Kind(size=1, words=("a",)))
    message = config.differences("kind", before, Kind(size=2, words=("a",), actors=5))
    assert message == "kind.size was 1, is 2"
    assert config.differences("kind", before, Kind(size=1, words=("a",))) == ""


def test_describe_has_every_setting_with_default_and_help():
    rows = config.describe(options.KINDS)
    assert ("embed.batch_size", "64", "images in one call of the encoder") in rows
    assert len(rows) == len({name for name, _, _ in rows})
    assert all(help and "\n" not in help for _, _, help in rows)


CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.toml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_of_the_project_load(path):
    found = config.load(options.KINDS, str(path))
    defaults = config.load(options.KINDS, None)
    assert found.keys() == options.KINDS.keys() and found != defaults


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_of_the_project_have_the_memory_for_their_clusters(path):
    found = config.load(options.KINDS, str(path))
    dim = train_settings.fit_settings(found["train"], 10**6).feature_dim
    fit = select_k_settings.fit_settings(found["select_k"], 10**6, 15_000, dim)
    assert fit.leaves >= fit.k
