"""ray job submit --working-dir . -- python -m jobs.shards --from FOLDER --out URL …"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["shards", *sys.argv[1:]]))
