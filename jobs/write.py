"""`python -m jobs.write` is `ratecluster write`."""

from jobs import run

run("write")
