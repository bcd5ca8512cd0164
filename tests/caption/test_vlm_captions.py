"""Clusters named by a server over HTTP: from real pictures, once each, and none that must be."""

import base64
import io
import logging
import threading
from pathlib import Path

import pytest
from PIL import Image

from examples import chat_server
from pipeline.caption import vlm_captions, vlm_client
from pipeline.runtime import progress
from pipeline.store import tables
from tests import fake_run
from tests.chat import prompt, saying, serving

NAMES = {fake_run.SCRIPT: "red noise", "green & <b>leafy</b>": "green noise"}


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_client, "WAIT_S", 0.0)
    return fake_run.build(tmp_path)


def by_candidate(asked, _):
    first = prompt(asked)["candidates"][0]
    return 200, saying(f'{{"caption": "{NAMES.get(first, "blue noise")}"}}')


def run(paths, url: str, **more):
    voted = tables.read(paths.captions.file("captions.parquet"))
    cfg = vlm_client.Config(namer=url, namer_model="tiny", **more)
    return vlm_captions.name_clusters(cfg, voted, paths.embeddings.manifest(), paths, "made-of")


def first(table) -> list[tuple[str, str]]:
    return [(r["caption"], r["source"]) for r in table.to_pylist() if r["rank"] == 0]


def test_names_stand_first_and_the_votes_after_them(paths):
    with serving(by_candidate) as chat:
        table, facts = run(paths, chat.url)
    names = ["red noise", "green noise", "blue noise"]
    assert first(table) == [(name, "model") for name in names]
    red = [r for r in table.to_pylist() if r["cluster_id"] == 0]
    assert [(r["rank"], r["caption"]) for r in red] == [
        (0, "red noise"), (1, fake_run.SCRIPT), (2, "red thing"),
    ]  # fmt: skip
    assert facts == {"named": 3, "unnamed": []} and len(chat.asked) == 3


def test_what_the_model_is_shown(paths):
    with serving(by_candidate) as chat:
        run(paths, chat.url, namer_pictures=2)
    asked = next(a for a in chat.asked if prompt(a)["candidates"][0] == fake_run.SCRIPT)
    _, *images = asked["messages"][0]["content"]
    assert len(images) == 2
    for image in images:
        kind, _, data = image["image_url"]["url"].partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        red, green, blue = picture.resize((1, 1)).getpixel((0, 0))
        assert kind == "data:image/jpeg" and picture.format == "JPEG"
        assert max(picture.size) <= vlm_captions.SIDE and red > 2 * max(green, blue)
    alts = prompt(asked)["alt_texts"]
    assert (
        alts[0].startswith(fake_run.SCRIPT)
        and len(alts) == len(set(alts)) <= vlm_captions.ALT_TEXTS
    )


def test_a_cluster_that_fails_keeps_its_caption_and_is_named(paths, caplog):
    def answer(asked, before):
        if prompt(asked)["candidates"][0] == fake_run.SCRIPT:
            return 200, saying("no caption but a whole story " * 9)
        return by_candidate(asked, before)

    with serving(answer) as chat:
        table, facts = run(paths, chat.url)
    assert first(table)[0] == (fake_run.SCRIPT, "alt text")
    assert [source for _, source in first(table)] == ["alt text", "model", "model"]
    assert facts == {"named": 2, "unnamed": [0]}
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("caption: 1 clusters keep their voted captions: 0; 0 is ")
    assert "the answer is no caption" in line


def test_no_cluster_is_asked_for_twice_after_an_interruption(paths, monkeypatch):
    waited = []

    def dying(names):
        waited.append(names)
        if len(waited) == 3:
            raise KeyboardInterrupt

    with serving(by_candidate) as chat:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(progress, "waiting_for", dying)
            run(paths, chat.url, namer_parallel=1)
        assert 2 <= len(chat.asked) <= 3
        table, facts = run(paths, chat.url)
    assert sorted(chat.clusters) == sorted(set(chat.clusters)) and len(chat.asked) == 3
    with serving(by_candidate) as chat:
        paths.captions.remove({"unfinished-names.safetensors"})
        assert run(paths, chat.url)[0].equals(table) and facts["named"] == 3


def test_names_of_other_settings_are_not_taken_over(paths):
    with serving(by_candidate) as chat:
        run(paths, chat.url)
        voted = tables.read(paths.captions.file("captions.parquet"))
        cfg = vlm_client.Config(namer=chat.url, namer_model="other")
        vlm_captions.name_clusters(cfg, voted, paths.embeddings.manifest(), paths, "made-of-other")
    assert len(chat.asked) == 6


def test_no_more_are_asked_about_at_once_than_set(paths):
    with serving(by_candidate, slow_s=0.2) as chat:
        run(paths, chat.url, namer_parallel=2)
    assert chat.most_busy == 2


@pytest.mark.parametrize("status", [404, 500])
def test_where_nothing_is_named_the_stage_fails(paths, status):
    message = rf"named none of 3 clusters \(HTTP {status}\)"
    with serving(lambda *_: (status, b"")) as chat, pytest.raises(RuntimeError, match=message):
        run(paths, chat.url)


def test_a_server_that_is_not_there_fails_the_stage(paths):
    with serving(by_candidate) as chat:
        url = chat.url
    with pytest.raises(RuntimeError, match=r"caption: http://127\.0\.0\.1.* or start its server"):
        run(paths, url)


def test_pictures_that_are_gone_cannot_be_shown(paths):
    for row in paths.embeddings.manifest()["shards"]:
        Path(row["shard"]["url"]).unlink()
    with serving(by_candidate) as chat, pytest.raises(RuntimeError, match="none of its pictures"):
        run(paths, chat.url)
    assert chat.asked == []


def test_a_name_that_was_voted_for_is_not_said_twice(paths):
    with serving(lambda *_: (200, saying("Red things"))) as chat:
        table, _ = run(paths, chat.url)
    red = [r["caption"] for r in table.to_pylist() if r["cluster_id"] == 0]
    assert red == ["Red things", fake_run.SCRIPT]


def test_the_worked_example_names_by_colour(paths):
    with chat_server.server(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table, _ = run(paths, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    red, green, _ = [caption for caption, _ in first(table)]  # the third candidate is hostile
    assert red.startswith("red <script>") and green.startswith("green green")
