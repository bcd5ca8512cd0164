"""`python -m jobs.caption` is `ratecluster caption`."""

from jobs import run

run("caption")
