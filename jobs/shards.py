"""`python -m jobs.shards` is `ratecluster shards`."""

from jobs import run

run("shards")
