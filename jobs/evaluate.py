"""`python -m jobs.evaluate` is `ratecluster evaluate`."""

from jobs import run

run("evaluate")
