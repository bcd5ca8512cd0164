"""ray job submit --working-dir . -- python -m jobs.all --shards PATTERN --root URL …"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["run", *sys.argv[1:]]))
