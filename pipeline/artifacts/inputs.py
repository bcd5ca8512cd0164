"""What the embeddings of a run were made from: shards, given files of embeddings, or both."""

from collections.abc import Mapping
from typing import Any

from pipeline.runtime.errors import UserError


def are_given(made_with: Mapping[str, Any]) -> bool:
    """Whether embeddings of these settings were given, and not made by an encoder."""
    return "id_column" in made_with


def has_shards(embedded: Mapping[str, Any]) -> bool:
    """Whether a run has shards, and so pictures; by the manifest of its embeddings/."""
    given = are_given(embedded.get("config", {}))
    return not given or all("file_url" in facts["shard"] for facts in embedded["shards"])


def require_shards(embedded: Mapping[str, Any], what: str) -> None:
    """UserError for a run of given embeddings alone; `what` needs the pictures."""
    if not has_shards(embedded):
        raise UserError(
            f"{what} needs pictures, and this run has embeddings alone; run it again with --shards "
            "beside --embeddings"
        )
