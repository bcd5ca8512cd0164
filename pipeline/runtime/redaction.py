"""Secrets in URLs: read from the environment when a URL is opened, never written or logged.

A URL names an environment variable instead of the secret: `https://host/0.tar?$QUERY`,
`sftp://me:$PASSWORD@host/shards`. So manifests can hold the URL, later stages can open it, and a
renewed signature does not cause any work to be repeated.
"""

import os
import re

from pipeline.runtime.errors import UserError

HTTP = ("http://", "https://")
# `user:password@`, also where an unescaped slash is in the password; not `host:8080/a@b`
USER = re.compile(r"(?<=://)([^/@?#:\s]*):(?!\d+(?:/|$))([^@?#\s]*)@")
QUERY = re.compile(r"(\b\w{1,20}://[^\s?'\"<>]+)\?([^\s'\"<>)]*)")
PARAMETER = re.compile(r"([^&;=?]*)=([^&;]*)")
PUBLIC = ("download", "versionId", "generation", "snapshot", "revision", "ref", "raw", "dl")
VARIABLE = re.compile(r"\$(\w+)")
SPOKEN = re.compile(  # of a query without its URL
    r"(\b(?:[\w-]{0,64}?(?:signature|token|secret|passw|credential)[\w-]{0,64}|sig)=)[^&\s'\"$…]+",
    re.IGNORECASE,
)
NAMES = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|SIGNATURE|CONNECTION_STRING)$", re.IGNORECASE
)
SHORTEST = 8  # characters; shorter values of variables are not hidden
HIDDEN = "…"

_used: set[str] = set()  # values that this process has taken from the environment


def resolved(url: str) -> str:
    """The URL to open: variables in its user part and its query are replaced by their values.

    Raises UserError for a secret in the URL itself, and for a variable that is not set.
    """
    if "://" not in url:
        return url
    place, mark, query = url.partition("?")
    for user in USER.finditer(place):
        if not VARIABLE.fullmatch(user[2]):
            raise _refused(url, "a password", "user:$NAME@host")
    if url.startswith(HTTP) and query and "=" not in query and not VARIABLE.fullmatch(query):
        raise _refused(url, "a query, which may be a secret", "…?$NAME")
    for name, value in PARAMETER.findall(query):
        if name not in PUBLIC and not VARIABLE.fullmatch(value):
            raise _refused(url, f"{name}=, which may be a secret", "…?$NAME")
    if url.startswith(HTTP):
        query = VARIABLE.sub(lambda match: secret(match[1], url), query)
    return USER.sub(lambda user: VARIABLE.sub(lambda m: secret(m[1], url), user[0]), place) + (
        mark + query
    )


def secret(name: str, wanted_by: str) -> str:
    """The value of an environment variable; `redacted` hides it from now on.

    Raises UserError if it is not set; the message names the URL or the setting that needs it.
    """
    if not (value := os.environ.get(name, "")):
        raise UserError(
            f"{redacted(wanted_by)}: the environment variable {name} is not set; set it"
        )
    _used.add(value)
    return value


def redacted(text: str) -> str:
    """The text without the secrets of its URLs and of the environment."""
    if "://" in text:
        text = USER.sub(lambda user: user[0] if user[2].startswith("$") else f"{HIDDEN}@", text)
        text = QUERY.sub(lambda found: f"{found[1]}?{_hidden_query(found[1], found[2])}", text)
    text = SPOKEN.sub(rf"\1{HIDDEN}", text)
    for value in {v for name, v in os.environ.items() if NAMES.search(name)} | _used:
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def harmless(error: Exception) -> Exception:
    """The error, or one with the same text without secrets."""
    text = str(error)
    if (without := redacted(text)) == text:
        return error
    kind = type(error) if isinstance(error, (FileNotFoundError, PermissionError)) else OSError
    return kind(without)


def _hidden_query(place: str, query: str) -> str:
    if place.startswith(HTTP) and query and "=" not in query and not query.startswith("$"):
        return HIDDEN
    return PARAMETER.sub(_hidden, query)


def _hidden(parameter: re.Match[str]) -> str:
    name, value = parameter.groups()
    return f"{name}={value if name in PUBLIC or value.startswith('$') else HIDDEN}"


def _refused(url: str, what: str, instead: str) -> UserError:
    return UserError(
        f"{redacted(url)} holds {what}: it would be written to manifests and logs; put it into an "
        f"environment variable and write {instead}, or use the store's own variables (AWS_…)"
    )
