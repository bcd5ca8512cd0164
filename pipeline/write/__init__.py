"""Stage 5: write the labels."""
