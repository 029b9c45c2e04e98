"""A corpus over the bundled model, and documents that it can answer from."""

from pathlib import Path

from kvloom.connectors.hf.loading import load_model
from kvloom.rag.corpus import Corpus

ROOT = Path(__file__).resolve().parent.parent.parent.parent
MODEL = ROOT / "bench" / "reference" / "model"
RECORDS = {
    "alice": "Record: the code of Alice is 4821.\n",
    "harbour": "Every ship that enters the harbour is written down, with the code of its cargo.\n",
    "loom": "A loom holds the warp threads in place while the weft is woven through them.\n",
    "honey": "The brother keeps bees and sells the honey in town on Mondays.\n",
}
QUESTION = "What is the code of Alice?"
CODE = "4821"


def open_corpus(folder: Path, **options: object) -> Corpus:
    """A corpus in which every answer is exact, unless the options say otherwise."""
    model, tokenizer = load_model(MODEL)
    return Corpus(folder, model, tokenizer, **{"recompute_ratio": 1.0, **options})  # type: ignore[arg-type]
