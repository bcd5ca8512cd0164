"""The chat interface over real HTTP: what is sent, what is taken for an answer, what is not."""

import json

import pytest

from pipeline.caption import vlm_client
from pipeline.runtime import redaction
from pipeline.runtime.errors import UserError
from tests.chat import prompt, saying, serving

URI = "data:image/jpeg;base64,AAAA"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(vlm_client, "WAIT_S", 0.0)


def settings(url: str, **more) -> vlm_client.Config:
    return vlm_client.Config(namer=url, namer_model="tiny", **more)


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("THE_SECRET_ONE", "sk-123456789")
    with serving(lambda asked, _: (200, saying('{"caption": "Two dogs"}'))) as chat:
        for base in (chat.url, f"{chat.url}/", f"{chat.url}/v1"):
            ask = vlm_client.Namer(
                settings(base, namer_key="THE_SECRET_ONE", namer_prompt="Name it.")
            )
            assert ask([URI], ["dog", 'a "quoted"\n小狗'], ["alt"]) == "Two dogs"
    [path] = set(chat.paths)
    asked = chat.asked[0]
    assert path == "/v1/chat/completions" and (asked["model"], asked["temperature"]) == ("tiny", 0)
    text, image = asked["messages"][0]["content"]
    assert image == {"type": "image_url", "image_url": {"url": URI}}
    assert text["text"].startswith("Name it.\n\n")
    assert prompt(asked) == {"candidates": ["dog", 'a "quoted"\n小狗'], "alt_texts": ["alt"]}
    assert chat.headers[0]["Authorization"] == "Bearer sk-123456789"
    assert redaction.redacted("it said sk-123456789 is wrong") == "it said … is wrong"


def test_without_a_key_none_is_sent():
    with serving(lambda asked, _: (200, saying("dogs"))) as chat:
        vlm_client.Namer(settings(chat.url))([URI], [], [])
    assert "Authorization" not in chat.headers[0]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ('{"caption": "red flags"}', "red flags"),
        ('```json\n{"caption": " red\\n flags. "}\n```', "red flags"),
        ('I think {"a": 1}, so\n{"caption": "小狗"}', "小狗"),
        ("Red flags.\n", "Red flags"),
        ('"می‌خواهم"', "می‌خواهم"),
    ],
)
def test_answers_that_hold_a_caption(content, caption):
    assert vlm_client.caption_of(saying(content)) == caption


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"error": "no such model"}',
        b"\xff\xfe",
        saying(None),
        saying(7),
        saying(""),
        saying("..."),
        saying('{"caption": null}'),
        saying('{"caption": ["dog"]}'),
        saying('{"name": "dog"}'),
        saying("{not json}"),
        saying("x" * 81),
        saying("These pictures show dogs. " * 9),
        saying("dog\x1b[31m"),
        saying("dog\u202egod"),
    ],
)
def test_answers_that_hold_none(answer):
    with pytest.raises(vlm_client.UnnamedError) as caught:
        vlm_client.caption_of(answer)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_may_pass_are_tried_again(status):
    with serving(lambda _, before: (status if before < 2 else 200, saying("dog"))) as chat:
        assert vlm_client.Namer(settings(chat.url))([URI], [], []) == "dog"
    assert len(chat.asked) == 3
    with (
        serving(lambda *_: (status, b"")) as chat,
        pytest.raises(vlm_client.UnnamedError) as caught,
    ):
        vlm_client.Namer(settings(chat.url))([URI], [], [])
    assert str(caught.value) == f"HTTP {status}" and len(chat.asked) == vlm_client.ATTEMPTS


@pytest.mark.parametrize("status", [400, 401, 404])
def test_other_errors_are_not(status):
    with (
        serving(lambda *_: (status, b"no")) as chat,
        pytest.raises(vlm_client.UnnamedError) as caught,
    ):
        vlm_client.Namer(settings(chat.url))([URI], [], [])
    assert str(caught.value) == f"HTTP {status}" and len(chat.asked) == 1


def test_a_slow_server_is_given_up(monkeypatch):
    monkeypatch.setattr(vlm_client, "ATTEMPTS", 2)
    with serving(lambda *_: (200, saying("dog")), slow_s=0.5) as chat:
        with pytest.raises(vlm_client.UnnamedError, match=r"[Tt]ime"):
            vlm_client.Namer(settings(chat.url, namer_timeout_s=0.05))([URI], [], [])
        assert len(chat.asked) == 2


def test_a_key_is_not_carried_elsewhere(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-123456789")
    with serving(lambda *_: (200, saying("dog"))) as other:
        target = f"{other.url}/v1/chat/completions".encode()
        with (
            serving(lambda *_: (302, target)) as chat,
            pytest.raises(vlm_client.UnnamedError) as caught,
        ):
            vlm_client.Namer(settings(chat.url, namer_key="MY_KEY"))([URI], [], [])
    assert str(caught.value) == "HTTP 302"
    assert other.asked == [] and len(chat.asked) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"namer": "localhost:8000", "namer_model": "m"}, "localhost:8000: give an http://"),
        ({"namer": "file:///etc/passwd", "namer_model": "m"}, "give an http://"),
        ({"namer": "http://localhost:8000"}, "needs caption.namer_model"),
        ({"namer_parallel": 0}, "give positive numbers"),
        ({"namer_timeout_s": 0.0}, "give positive numbers"),
    ],
)
def test_settings_that_make_no_sense(more, message):
    with pytest.raises(UserError) as caught:
        vlm_client.Config(**more)
    assert message in str(caught.value)


def test_secrets_are_looked_for_before_anything_is_asked(monkeypatch):
    vlm_client.check(vlm_client.Config())
    with pytest.raises(UserError, match=r"namer_key: the environment variable NOT_THERE is not"):
        vlm_client.check(settings("http://localhost:1", namer_key="NOT_THERE"))
    with pytest.raises(UserError, match="holds a password"):
        vlm_client.check(settings("http://me:secret@host"))
    monkeypatch.setenv("PASS", "abcdefghij")
    assert "abcdefghij" in vlm_client.Namer(settings("http://me:$PASS@host")).url


def test_the_prompt_asks_for_what_is_read():
    example = vlm_client.PROMPT[vlm_client.PROMPT.index("{") :]
    assert list(json.loads(example)) == ["caption"]
