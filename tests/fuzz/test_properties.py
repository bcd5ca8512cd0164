"""The properties, for bytes that Hypothesis makes: the same ones every time, and not many."""

import json
import tarfile
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import corpus
from tests.fuzz import properties
from tests.store.tars import tar_of

pytestmark = pytest.mark.filterwarnings("ignore")  # PIL's remarks on broken tags
QUICK = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
IMAGES = sorted(corpus.real_images().values(), key=len)
TYPES = st.sampled_from([tarfile.REGTYPE, *tarfile.SUPPORTED_TYPES, b"V", b"Z"])
NAMES = st.text(max_size=120) | st.from_regex(r"(\.\./|/)?[a-c]?/?[a-c]\.(jpg|json|txt|JPG)")


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A member with a checksum that is right and, as likely as not, nothing else."""
    header = tarfile.TarInfo(draw(NAMES))
    header.type = draw(TYPES)
    header.linkname = draw(st.text(max_size=10))
    data = draw(st.binary(max_size=600))
    header.size = draw(st.just(len(data)) | st.integers(0, 8**11 - 1))
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    try:
        block = header.tobuf(form, "utf-8", "surrogateescape")
    except (ValueError, UnicodeError):  # a name that this form cannot hold
        block = b""
    return block + data + bytes(-len(data) % draw(st.sampled_from([1, 512])))


@st.composite
def changed(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real file with some bytes changed, taken out or put in."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@QUICK
@given(st.lists(headers(), max_size=6).map(b"".join))
def test_any_members_are_read(data):
    properties.reader(data)
    properties.reader(data + bytes(1024))


@QUICK
@given(changed([tar_of(("a.jpg", b"x" * 99), ("a.json", b'{"a": 1}'), ("b.jpg", b"y"))]))
def test_any_changed_tar_is_read(data):
    properties.reader(data)


@QUICK
@given(st.binary(max_size=2000) | changed(IMAGES))
def test_any_bytes_are_a_picture_or_a_reason(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        properties.decoder(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@QUICK
@given(st.dictionaries(st.text(), JSON, max_size=6), st.booleans())
def test_any_json_is_columns(values, ascii):
    text = json.dumps(values, ensure_ascii=ascii)
    properties.texts(text.encode("utf-8", "surrogatepass"))


@QUICK
@given(changed([data for data, _ in corpus.jsons().values() if len(data) < 5000]))
def test_any_changed_json_is_columns_or_none(data):
    properties.texts(data)
