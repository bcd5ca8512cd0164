"""A run of all stages under faults that are really done to it; see `python -m tests.chaos -h`."""
