"""`python -m jobs.train` is `ratecluster train`."""

from jobs import run

run("train")
