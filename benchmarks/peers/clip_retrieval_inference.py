"""A peer: `clip-retrieval inference`, with an architecture that open_clip does not know.

Runs in a Python of its own, without this project.
"""

import sys
from types import ModuleType

import open_clip
import packaging.version

# clip-anytorch 2.6 takes `packaging` from a module that setuptools has no more, and torch needs a
# setuptools as new as that.
sys.modules.setdefault("pkg_resources", ModuleType("pkg_resources")).packaging = packaging

from clip_retrieval.cli import main  # noqa: E402

if __name__ == "__main__":
    config = sys.argv.pop(1)
    if config:
        open_clip.add_model_config(config)
    main()
