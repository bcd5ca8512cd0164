"""Words to vectors: templates averaged, order kept over many calls."""

import numpy as np
import pytest

from pipeline.vision import clip, text_encoding


@pytest.fixture(scope="module")
def encoder():
    return clip.load("pico-clip", "")


@pytest.mark.ray
def test_templates_are_averaged(encoder, ray_session):
    found, scale = text_encoding.encode(["dog", "car"], ("{}", "a {} here"), "pico-clip", "")
    both = [encoder.encode_texts([w, f"a {w} here"], 2).mean(axis=0) for w in ("dog", "car")]
    expected = np.stack([v / np.linalg.norm(v) for v in both])
    assert found == pytest.approx(expected, abs=1e-5)
    assert scale == pytest.approx(encoder.logit_scale)


@pytest.mark.ray
def test_words_keep_their_order_over_calls(encoder, ray_session, monkeypatch):
    monkeypatch.setattr(text_encoding, "TEXTS_PER_CALL", 2)
    words = ["dog", "car", "pizza", "tree", "house"]
    found, scale = text_encoding.encode(words, (), "pico-clip", "")
    bare = encoder.encode_texts(words, 2)  # pico-clip's own template is the word alone
    assert found == pytest.approx(bare, abs=1e-5)
    assert found.dtype == np.float32 and scale == pytest.approx(encoder.logit_scale)
