"""ray job submit --working-dir . -- python -m jobs.evaluate --root URL [--config TOML] [--set …]"""

import sys

from pipeline.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.invoke(["evaluate", *sys.argv[1:]]))
