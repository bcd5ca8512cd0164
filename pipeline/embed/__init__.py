"""Stage 1: image shards to CLIP embeddings."""
