"""`python -m jobs.select_k` is `ratecluster select-k`."""

from jobs import run

run("select-k")
