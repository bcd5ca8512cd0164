"""`python -m jobs.all` is `ratecluster run`."""

from jobs import run

run("run")
