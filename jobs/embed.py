"""`python -m jobs.embed` is `ratecluster embed`."""

from jobs import run

run("embed")
