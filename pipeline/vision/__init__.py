"""Images and words to vectors."""
