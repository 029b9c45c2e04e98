"""The second half of the demo, run as a process of its own: `python -m kvloom.bench.demo.restart OPTIONS STORE OUT`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from .run import DemoOptions, measure


def main() -> None:
    """Measure over an existing store and write the rows to OUT; OPTIONS is the JSON of `DemoOptions`."""
    text, store_dir, out = sys.argv[1:]
    asked = json.loads(text)
    model, docs = (None if asked[name] is None else Path(asked[name]) for name in ("model", "docs"))
    options = DemoOptions(model=model, docs=docs, question=asked["question"], quick=asked["quick"])
    scores, _ = measure(options, Path(store_dir), restarted=True)
    Path(out).write_text(json.dumps([asdict(s.summary(scores[0])) for s in scores]))


if __name__ == "__main__":
    main()
