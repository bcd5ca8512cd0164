"""Why a sample is a row of rejects/: the whole set, and text from data made fit to be read."""

from enum import Enum


class Reason(str, Enum):
    """The codes that `reason` and `error_message` begin with; what follows a colon is detail.

    All but DECODE_TIMEOUT depend on the shard's bytes and the settings alone.
    """

    DUPLICATE_KEY = "duplicate_key"  # a sample of this key came before in the shard
    DUPLICATE_MEMBER = "duplicate_member"  # two of its files have the same suffix
    UNSAFE_NAME = "unsafe_name"  # absolute, with `..` or NUL
    LINK = "link"  # a symbolic or hard link
    SPECIAL_FILE = "special_file"  # a device, a pipe, or of a type that tar does not know
    SPARSE_FILE = "sparse_file"  # a file with holes
    SAMPLE_TOO_LARGE = "sample_too_large"  # its files exceed embed.max_sample_bytes
    CUT_OFF = "cut_off"  # the shard is damaged inside it
    MISSING_IMAGE = "missing_image"  # none of its files is an image
    AMBIGUOUS_IMAGE = "ambiguous_image"  # several images, none of which is `key.suffix`
    EMPTY = "empty"  # an image of no bytes
    NOT_AN_IMAGE = "not_an_image"  # its first bytes are of none of the six formats
    TOO_LARGE = "too_large"  # more than embed.max_image_pixels
    TOO_ELONGATED = "too_elongated"  # one side is more than 100 times the other
    TRUNCATED = "truncated"  # the image ends early
    CORRUPT = "corrupt"  # the image cannot be decoded
    DECODE_TIMEOUT = "decode_timeout"  # longer than embed.decode_timeout_s: on this machine, then
    EMBEDDING_NOT_FINITE = "embedding_not_finite"  # the encoder gave NaN or infinity
    SHARD = "shard"  # of no sample: the shard is damaged, or lacks its end

    def because(self, detail: object = "") -> str:
        """The line for a row: the code, and the detail in printable characters."""
        return f"{self.value}: {printable(str(detail))}" if str(detail) else self.value


def printable(text: str) -> str:
    """`text` on one line, in which nothing steers a terminal: such characters are spelt `\\x1b`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
