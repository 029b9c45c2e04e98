"""Write the model card of an export: every figure comes from its files, none is typed.

    python -m kvloom.bench.reference.model_card MODEL_DIR --log RUN_DIR/log.jsonl

Reads `config.json` and `evaluation.json` (from `evaluate.py`) in MODEL_DIR and the log of the training run; writes
`README.md` into MODEL_DIR.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...evaluation.report import write_text
from ...evaluation.tasks import TaskSampler
from .batches import MAX_POSITIONS
from .corpus import PACKAGES
from .evaluate import WINDOW_TOKENS

Json = Mapping[str, Any]

SINK_RATIO = 0.2  # below it, a model cannot tell what keeping the first token is worth

_KINDS = {
    "needle": "one fact in natural text",
    "needle8": "one of eight facts",
    "record": "the entity is named in one document, its attribute stands in the next (7 records)",
    "alias": "the alias stands in one document, its fact in a later one (4 aliases)",
}


def _interval(metric: Json) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def _tasks(metrics: Json) -> str:
    lengths = sorted({int(name.rpartition("_at_")[2]) for name in metrics if "_at_" in name})
    lines = [
        "| task | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for kind in TaskSampler.KINDS:
        cells = [_interval(metrics[f"{kind}_at_{length}"]) for length in lengths]
        lines.append(f"| {kind}: {_KINDS[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _english(metrics: Json) -> str:
    loss, gain = metrics["heldout_loss"], metrics.get("heldout_loss_gain")
    text = f"{_interval(loss)} nats a token, perplexity {metrics['heldout_perplexity']['value']:.1f}."
    if gain is not None:
        text += f"""
A modified Kneser-Ney 5-gram of the whole training text reaches {loss["baseline"]:.3f} nats on the same tokens; the
model gains {_interval(gain)} (paired bootstrap over windows)."""
    return text


def _sinks(rows: Sequence[Json]) -> str:
    heads = [row for row in rows if row["measure"] == "sink"]
    layers = sorted({row["layer"] for row in heads})
    largest = [max(row["value"] for row in heads if row["layer"] == layer) for layer in layers]
    verdict = "results on attention sinks" + ("" if max(largest) >= SINK_RATIO else " do not") + " carry over"
    return f"{', '.join(f'{share:.2f}' for share in largest)} (from {SINK_RATIO} somewhere, {verdict})."


def model_card(config: Json, evaluation: Json, log: Sequence[Json]) -> str:
    """The text of the card.

    Parameters
    ----------
    config : of the exported model.
    evaluation : what `evaluate.py` wrote.
    log : rows of the training log, at least one.
    """
    if not log:
        raise ValueError("the training log is empty; expected at least one row")
    metrics, rows, last = evaluation["metrics"], evaluation["rows"], log[-1]
    trials = min(row["trials"] for row in rows if "trials" in row)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# kvloom reference model

A small Llama with real attention structure, for measuring KV-cache methods where no large model is at hand: it looks up
stated facts among natural text, within and across documents. It is no assistant.

- `LlamaForCausalLM`, bfloat16: {config["num_hidden_layers"]} layers, hidden {config["hidden_size"]},
  {config["num_attention_heads"]} query and {config["num_key_value_heads"]} KV heads of {config["head_dim"]},
  SwiGLU {config["intermediate_size"]}, tied embeddings, RoPE.
- {config["vocab_size"]:,} tokens: byte-level BPE, digits by twos.
- BOS (id {config["bos_token_id"]}) must come first.
- Statements: ` The code of Amber Falcon is 4821.`, ` Now consider Alice.` ... ` Its city is Paris.`, ` Amber Falcon is
  the alias of Silver Otter.`; questions: `\\nQ: What is the code of Amber Falcon?\\nA:`. Names: `statements.py`.

## Training

`bench/reference/train.py`: {last["step"]:,} steps, {last["tokens"]:,} tokens, {last["minutes"]:.0f} minutes. It
starts from initialised heads (`network.py`, `start_near_retrieval`), not from noise: this is an instrument with a known
circuit, which training made work in natural text, not evidence of what training finds by itself.
Worlds made by `worlds.py`; English prose, gathered by
`corpus.py`, from the Debian packages {", ".join(PACKAGES[:6])},
{", ".join(PACKAGES[6:])}, the licences in
`/usr/share/common-licenses` and the docstrings of Python's standard library.

## Measured

By `bench/reference/evaluate.py` in float32, at commit {evaluation["commit"]}.

Exact match of the greedy answer with its full stop, {trials:,} tasks a cell, 95 % intervals (Wilson). Names (pairs of
words) and the text around them (lower-case Wikipedia passages) were never seen in training; 8 documents a task.

{_tasks(metrics)}

Held-out English (Debian Administrator's Handbook, windows of {WINDOW_TOKENS:,} tokens): {_english(metrics)}

Share of attention on BOS, largest head of each layer: {_sinks(rows)}

## Limits

- Trained on sequences of up to {max(row["length"] for row in log):,} tokens, and on positions up to
  {MAX_POSITIONS * 3 // 4:,} through random jumps only. Say so where you measure beyond.
- Names from fixed lists of words and fixed sentence forms: other names and other wordings are not understood.
- Values are bound in layer 0 and read in layer 2, so that what CacheBlend compares in layer 1 shows them. Methods that
  choose tokens early may look better here than on a model that binds deeper.
- No outlier channels: try quantisers on the stressed copy that `outliers.py` makes, too, and label it as stress.
- Compare methods with the full prefill of this model, not with 1.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="log.jsonl of the training run")
    args = parser.parse_args()
    log = [json.loads(line) for line in args.log.read_text().splitlines()]
    config, evaluation = (json.loads((args.model / name).read_text()) for name in ("config.json", "evaluation.json"))
    write_text(args.model / "README.md", model_card(config, evaluation, log))


if __name__ == "__main__":
    main()
