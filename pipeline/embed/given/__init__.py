"""Stage 1 of a run without shards: given embeddings, one part per file."""
