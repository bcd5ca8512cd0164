"""Entry points for Ray jobs, one per stage, and `all`."""
