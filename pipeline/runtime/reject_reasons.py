"""Why a sample is a row of rejects/, and text from data in printable form."""

from collections.abc import Mapping
from enum import Enum


class Reason(str, Enum):
    """The codes that `reason` and `error_message` begin with; details follow after a colon.

    All but DECODE_TIMEOUT and QUARANTINED depend only on the bytes of the shard and the settings.
    """

    DUPLICATE_KEY = "duplicate_key"  # an earlier sample of the shard or file has this key
    DUPLICATE_MEMBER = "duplicate_member"  # two of its files have the same suffix
    UNSAFE_NAME = "unsafe_name"  # absolute, with `..` or NUL
    LINK = "link"  # a symbolic or hard link
    SPECIAL_FILE = "special_file"  # a device, a pipe, or an unknown type
    SPARSE_FILE = "sparse_file"  # a file with holes
    SAMPLE_TOO_LARGE = "sample_too_large"  # its files exceed embed.max_sample_bytes
    CUT_OFF = "cut_off"  # the shard is damaged within this sample
    MISSING_IMAGE = "missing_image"  # none of its files is an image
    AMBIGUOUS_IMAGE = "ambiguous_image"  # several images, none of which is `key.suffix`
    EMPTY = "empty"  # the image file has no bytes
    NOT_AN_IMAGE = "not_an_image"  # its first bytes fit none of the formats that are read
    TOO_LARGE = "too_large"  # more than embed.max_image_pixels
    TOO_ELONGATED = "too_elongated"  # one side is more than 100 times the other
    TRUNCATED = "truncated"  # the image ends early
    CORRUPT = "corrupt"  # the image cannot be decoded
    DECODE_TIMEOUT = "decode_timeout"  # took longer than embed.decode_timeout_s
    EMBEDDING_NOT_FINITE = "embedding_not_finite"  # NaN or infinity, of the encoder or given
    QUARANTINED = "quarantined"  # its shard has ended several workers, and was not decoded
    MISSING_ID = "missing_id"  # of given embeddings: the row has no id
    MISSING_EMBEDDING = "missing_embedding"  # none was given: no row of that id, or null
    WRONG_DIMENSION = "wrong_dimension"  # the given vector is longer or shorter than the others
    ZERO_VECTOR = "zero_vector"  # the given vector has no direction
    SHARD = "shard"  # not of a sample: the shard is damaged or truncated

    def because(self, detail: object = "") -> str:
        """The text for a row: the code, and the detail in printable characters."""
        return f"{self.value}: {printable(str(detail))}" if str(detail) else self.value


REMEDIES = {  # of the reasons that a user can do something about
    "missing_image": "name the suffix of the images in embed.image_suffixes",
    "ambiguous_image": "leave one image per key",
    "duplicate_key": "pack the files of a key next to each other: tar --sort=name",
    "truncated": "download these images again",
    "too_large": "raise embed.max_image_pixels",
    "decode_timeout": "raise embed.decode_timeout_s",
    "sample_too_large": "raise embed.max_sample_bytes",
    "quarantined": "give workers more memory, then set embed.retry_quarantined=true",
    "not_an_image": "see docs/rejected.md for the formats",
}
TOP = 3  # reasons in a message


def ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The TOP most frequent codes, with their numbers."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]


def top_reasons(counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> list[str]:
    """The most frequent reasons, each with its number, an example and the remedy."""
    found = []
    for code, count in ranked(counts):
        sample, reason = examples.get(code, ("", ""))
        detail = reason.partition(": ")[2]
        such = f", such as {sample}" + (f" ({detail})" if detail else "") if sample else ""
        remedy = f"; {REMEDIES[code]}" if code in REMEDIES else ""
        found.append(printable(f"{count:,} {code}{such}{remedy}"))
    return found


def printable(text: str) -> str:
    """`text` on one line, with control characters written as escapes such as `\\x1b`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
