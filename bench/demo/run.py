"""`kvloom demo`: a question answered over cached documents, by every method, before and after a process restart."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from ...connectors.hf.connector import TransformersConnector
from ...connectors.hf.model import TransformersModel
from ...core import Tier
from ...evaluation.fused_answers import FULL, HOST_BYTES, NAIVE, NEW_TOKENS, PREFIX, Score, Summary, blend, own, score
from ...evaluation.models import load_model, token_counter
from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric
from ...evaluation.screen import progress
from ...evaluation.texts import read_documents
from ...evaluation.wording import PLAIN, Frame, frame_of
from ...evaluation.workload import Case, own_case, question_cases, task_cases
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..harness.page_cache import drop_page_cache
from .sweep import sweep

METHODS = (FULL, PREFIX, NAIVE, blend(0.15, "first"), blend(0.05), blend(0.15), blend(0.30), own(0.15))


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of the demo.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    docs : a folder of texts: documents to ask about if there is a `question`, else text to hide tasks in.
    question : asked over `docs`, or over bundled passages.
    store : folder of the disk tier, kept; None for a temporary one.
    quick : smallest sizes.
    curves : also measure over numbers of documents and recompute ratios, for the plots of a report.
    """

    model: Path | None = None
    docs: Path | None = None
    question: str | None = None
    store: Path | None = None
    quick: bool = False
    curves: bool = False


def demo_cases(
    options: DemoOptions, count_tokens: Callable[[str], int], max_tokens: int, *, frame: Frame = PLAIN
) -> list[Case]:
    """The cases that the demo asks, see `DemoOptions`.

    Raises
    ------
    ValueError : the documents cannot be read, or do not fit into `max_tokens`.
    """
    texts = None if options.docs is None else read_documents(options.docs)
    if options.question is not None:
        documents = tuple(texts) if texts is not None else question_cases(1)[0].documents
        case = own_case(documents, options.question, frame=frame)
        total = len(frame.lead_ids) + sum(map(count_tokens, documents)) + count_tokens(case.question) + NEW_TOKENS + 16
        if total > max_tokens:
            raise ValueError(
                f"documents and question have about {total} tokens, the model's context {max_tokens}; "
                "give fewer or shorter documents"
            )
        return [case] * (2 if options.quick else 5)
    # Documents fill a little less. A model of the user's own may be many times as slow as the bundled one.
    context = min(512 if options.quick else 4480 if options.model is None else 1024, max_tokens - 256)
    second = "needle" if frame.is_chat else "alias"  # two hops are beyond small models of instructions
    counts = {"record": 2, second: 1} if options.quick else {"record": 6, second: 4}
    cases = [
        case
        for kind, n in counts.items()
        for case in task_cases(texts, count_tokens, kind=kind, count=n, context_tokens=context, frame=frame)
    ]
    if texts is not None:
        return cases
    return [*cases, *question_cases(1, passages=2 if options.quick or options.model is not None else 10, frame=frame)]


def measure(options: DemoOptions, store_dir: Path, *, restarted: bool) -> tuple[list[Score], list[Case]]:
    """All methods on all cases; after a restart every chunk is read from the disk, past the page cache."""
    model, tokenizer = load_model(options.model)
    TransformersModel(model, model_id="demo")  # says now what it could not serve
    frame = frame_of(tokenizer)
    cases = demo_cases(options, token_counter(tokenizer), model.config.max_position_embeddings, frame=frame)
    tiers: list[Tier] = [HostTier(HOST_BYTES), DiskTier(store_dir)]  # opened last: a wrong option leaves nothing behind
    with KVStore(tiers) as store, progress() as bar:
        connector = TransformersConnector(model, tokenizer, store, lead_ids=frame.lead_ids)
        if not restarted:
            documents = list(dict.fromkeys(d for case in cases for d in case.documents))
            computing = bar.add_task("computing documents", total=len(documents))
            for document in documents:
                connector.precompute([document])
                bar.advance(computing)
            # A store that is kept may hold them from an earlier run, on the disk only.
            store.prefetch([connector.key_of(connector.encode_document(d)) for d in documents]).result()
        task = bar.add_task("answering after a restart" if restarted else "answering", total=len(cases))
        scores = score(
            connector,
            cases,
            METHODS,
            before_each=(lambda: drop_page_cache(store_dir)) if restarted else (lambda: None),
            advance=lambda: bar.advance(task),
        )
        return scores, cases


def run_demo(options: DemoOptions) -> BenchResult:
    """Run the demo; see `DemoOptions`.

    Raises
    ------
    ValueError, KVLoomError : an option is wrong; nothing has been written then.
    """
    with ExitStack() as stack:
        store_dir = options.store
        if store_dir is None:
            store_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvloom-demo-"))) / "store"
        scores, cases = measure(options, store_dir, restarted=False)
        phases = {"first run": [s.summary(scores[0]) for s in scores], "after restart": _restarted(options, store_dir)}
        plots = sweep(options.model, options.docs, store_dir, quick=options.quick) if options.curves else ()
    kinds = Counter(case.kind for case in cases)
    notes = ["Asked: " + "; ".join(f"{n} {_KINDS[kind]}" for kind, n in kinds.items()) + ".", _LEGEND]
    if options.question is not None:
        notes += _answers(options, scores)
    table = [{"phase": phase} | asdict(row) for phase, rows in phases.items() for row in rows]
    tables = [_table(title, phases[phase]) for phase, title in _TITLES.items()]
    return BenchResult("demo", _metrics(phases), table, tables, plots, notes=notes)


def _restarted(options: DemoOptions, store_dir: Path) -> list[Summary]:
    """Repeat the measurement in a fresh process over the same store."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    with tempfile.TemporaryDirectory(prefix="kvloom-demo-") as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"{__package__}.restart", json.dumps(asked), str(store_dir), str(out)]
        subprocess.run(command, check=True)
        return [Summary(**row) for row in json.loads(out.read_text())]


def _table(title: str, rows: Sequence[Summary]) -> Table:
    right = [f"{_KINDS[kind].split()[0]} right" for kind in rows[0].exact_match]
    heads = ["method", "TTFT ms", "speed-up", "computed", "loaded", *right, "KL nats"]
    return Table(heads, [_cells(row) for row in rows], title)


_TITLES = {
    "first run": "documents precomputed once, then fused from host memory",
    "after restart": "after a process restart: every chunk from the disk, past the page cache",
}
_KINDS = {
    "record": "records (an entity is named in one document, its code stands in the next)",
    "needle": "needles (one fact in natural text)",
    "alias": "aliases (two hops over two documents)",
    "question": "questions over documents as they are",
}
_LEGEND = (
    "TTFT: time to first token, from the request's tokens to the answer's first, median. Speed-up: full prefill's time "
    "over it, question by question. Computed: tokens that ran through a layer, mean over layers. Loaded: from where. "
    "Right: answered word for word. KL: of the next-token distribution to that "
    "of full prefill. CacheBlend: as published. kvloom: the default, `Blender()`, at the share of tokens in its name."
)


def _cells(row: Summary) -> list[str]:
    return [
        row.method,
        f"{row.ttft_s * 1e3:.0f}",
        f"{row.speedup:.2f}x",
        f"{row.computed_tokens:,.0f}",
        " + ".join(f"{size / 1e6:.1f} MB {tier}" for tier, size in row.loaded_bytes.items()) or "-",
        *(f"{share:.0%}" for share in row.exact_match.values()),
        f"{row.kl:.4f}",
    ]


def _answers(options: DemoOptions, scores: Sequence[Score]) -> list[str]:
    _, tokenizer = load_model(options.model)
    texts = [str(tokenizer.decode(list(s.outcomes[0].tokens), skip_special_tokens=True)) for s in scores]
    return [f"{s.method.name:>18}: {text.strip()!r}" for s, text in zip(scores, texts, strict=True)]


def _metrics(phases: Mapping[str, Sequence[Summary]]) -> dict[str, Metric]:
    found = {}
    for phase, rows in phases.items():
        for row in rows:
            name = f"{row.method} {phase}".replace(" ", "_")
            found[f"ttft_s_{name}"] = Metric(row.ttft_s, row.ttft_s_p10, row.ttft_s_p90, "s", rows[0].ttft_s)
            for kind, share in row.exact_match.items():
                baseline = rows[0].exact_match[kind]
                found[f"exact_match_{kind}_{name}"] = Metric(share, unit="share", baseline=baseline)
    return found
