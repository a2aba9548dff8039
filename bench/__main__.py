"""``python -m bench``: the measurement on the CPU."""

import sys

from bench import heap

if __name__ == "__main__":
    heap.restart(heap.chosen(sys.argv[1:]))
    from bench.cpu import main

    sys.exit(main())
