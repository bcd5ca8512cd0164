"""Read by every Python process of a run under faults: the faulty store, renames that fail."""

import os

if "CHAOS_PLAN" in os.environ:
    import fsspec

    from tests.chaos import faulty

    fsspec.register_implementation("faulty", faulty.FaultyFileSystem)
    faulty.break_renames()
