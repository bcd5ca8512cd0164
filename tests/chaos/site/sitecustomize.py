"""Read by every Python process of a run under faults: makes the store `faulty://` known there."""

import os

if "CHAOS_PLAN" in os.environ:
    import fsspec

    fsspec.register_implementation("faulty", "tests.chaos.faulty.FaultyFileSystem")
