"""ray job submit --working-dir . -- python -m jobs.embed --shards PATTERN --root URL …"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["embed", *sys.argv[1:]]))
