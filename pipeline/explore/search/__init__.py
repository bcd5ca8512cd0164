"""Search a run by text or image."""
