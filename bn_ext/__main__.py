"""``python -m bn_ext``: what is built, what runs, and whether it computes what it should."""

import sys

from bn_ext.tools import info

if __name__ == "__main__":
    sys.exit(info.main())
