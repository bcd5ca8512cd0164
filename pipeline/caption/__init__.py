"""Stage 4: ranked captions for every cluster."""
