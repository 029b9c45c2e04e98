"""The second half of the demo, run as a process of its own: `python -m kvloom.bench.restart OPTIONS STORE OUT`."""

import json
import sys
from pathlib import Path

from .demo import measure, options_from, rows_of


def main() -> None:
    options, store_dir, out = sys.argv[1:]
    scores, _ = measure(options_from(options), Path(store_dir), restarted=True)
    Path(out).write_text(json.dumps(rows_of(scores, "after restart")))


if __name__ == "__main__":
    main()
