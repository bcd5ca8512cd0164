"""ray job submit --working-dir . -- python -m jobs.report --root URL [--config TOML] [--set …]"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["report", *sys.argv[1:]]))
