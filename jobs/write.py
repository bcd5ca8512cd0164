"""ray job submit --working-dir . -- python -m jobs.write --root URL [--config TOML] [--set …]"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["write", *sys.argv[1:]]))
