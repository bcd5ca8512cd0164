"""A peer: `clip-retrieval inference`, told of an architecture that open_clip does not know.

Runs in a Python of its own, without this project.
"""

import sys

import open_clip
from clip_retrieval.cli import main

if __name__ == "__main__":
    config = sys.argv.pop(1)
    if config:
        open_clip.add_model_config(config)
    main()
