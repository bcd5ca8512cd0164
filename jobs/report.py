"""`python -m jobs.report` is `ratecluster report`."""

from jobs import run

run("report")
