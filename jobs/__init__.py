"""Entry points for Ray jobs, one per stage and `all`.

`ray job submit --working-dir . -- python -m jobs.train --root URL` runs `ratecluster train`.
"""

import sys

from pipeline.cli import main as cli


def run(command: str) -> None:
    """Run the command with the arguments of this process, and exit with its code."""
    cli.main([command, *sys.argv[1:]])
