"""``python -m bn_ext``: what is built and what runs; ``compare`` and ``bench`` measure."""

import sys

from bn_ext.tools import command

if __name__ == "__main__":
    sys.exit(command.main())
