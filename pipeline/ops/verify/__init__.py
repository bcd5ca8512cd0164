"""Check all files of a run."""
