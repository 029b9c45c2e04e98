"""`kvloom demo`: a question answered over cached documents, by every method, before and after a process restart."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as ConsoleTable
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..connectors.hf import TransformersConnector
from ..connectors.hf_model import check_supported
from ..core import Tier
from ..kvstore.store import KVStore
from ..kvstore.tiers.disk import DiskTier
from ..kvstore.tiers.host import HostTier
from .fusion import FULL, NAIVE, NEW_TOKENS, PREFIX, Method, Score, Summary, blend, score
from .page import Plot, Point, Section, Table, html_report
from .page_cache import drop_page_cache
from .report import BenchResult, Metric, output, spread, write_text
from .workload import Case, question_cases, read_documents, task_cases

BUNDLED_MODEL = Path(__file__).parent / "reference" / "model"
HOST_BYTES = 4 << 30
METHODS = (FULL, PREFIX, NAIVE, blend(0.15, "first"), blend(0.05), blend(0.15), blend(0.30))


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line says; every field may be left out.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    docs : a folder of texts: documents to ask about if there is a `question`, else text to hide tasks in.
    question : asked over `docs`, or over bundled passages.
    json, report : files to write.
    store : folder of the disk tier, kept; None for a temporary one.
    quick : smallest sizes.
    """

    model: Path | None = None
    docs: Path | None = None
    question: str | None = None
    json: Path | None = None
    report: Path | None = None
    store: Path | None = None
    quick: bool = False


def load_model(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A local model and its tokenizer; float32 on a CPU, where it is exact, the model's own dtype on a GPU.

    Raises
    ------
    ValueError : there is no usable Hugging Face folder.
    """
    folder = BUNDLED_MODEL if folder is None else folder
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no model in {folder}: --model takes a local Hugging Face folder with config.json and weights"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto" if cuda else torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the model in {folder}: {error}") from error
    torch.nn.Module.to(model, "cuda" if cuda else "cpu")
    return model.eval(), tokenizer


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def demo_cases(options: DemoOptions, count_tokens: Callable[[str], int], max_tokens: int) -> list[Case]:
    """What the demo asks, see `DemoOptions`.

    Raises
    ------
    ValueError : the documents cannot be read, or do not fit into `max_tokens`.
    """
    texts = None if options.docs is None else read_documents(options.docs)
    if options.question is not None:
        documents = tuple(texts) if texts is not None else question_cases(1)[0].documents
        total = sum(map(count_tokens, documents)) + count_tokens(options.question) + NEW_TOKENS + 16
        if total > max_tokens:
            raise ValueError(
                f"documents and question have about {total} tokens, the model's context {max_tokens}; "
                "give fewer or shorter documents"
            )
        return [Case("question", documents, f"\nQ: {options.question}\nA:")] * (2 if options.quick else 5)
    context = min(512 if options.quick else 4480, max_tokens - 128)  # of which documents fill a little less
    count = 2 if options.quick else 8
    kinds = {"record": count, "alias": count // 2}
    cases = [
        case
        for kind, n in kinds.items()
        for case in task_cases(texts, count_tokens, kind=kind, count=n, context_tokens=context)
    ]
    return cases if texts is not None else [*cases, *question_cases(1 if options.quick else 2)]


def measure(options: DemoOptions, store_dir: Path, *, restarted: bool) -> tuple[list[Score], list[Case]]:
    """All methods on all cases; after a restart every chunk is read from the disk, past the page cache."""
    model, tokenizer = load_model(options.model)
    check_supported(model)
    cases = demo_cases(options, token_counter(tokenizer), model.config.max_position_embeddings)
    tiers: list[Tier] = [HostTier(HOST_BYTES), DiskTier(store_dir)]  # opened last: a wrong option leaves nothing behind
    with KVStore(tiers) as store, Progress(console=Console(stderr=True), transient=True) as bar:
        connector = TransformersConnector(model, tokenizer, store)
        if not restarted:
            documents = list(dict.fromkeys(d for case in cases for d in case.documents))
            connector.precompute(documents, progress=True)
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


def run_demo(options: DemoOptions) -> None:
    """Run the demo and print it; see `DemoOptions`.

    Raises
    ------
    ValueError, KVLoomError : an option is wrong; nothing has been written then.
    """
    console = output()
    with ExitStack() as stack:
        store_dir = options.store
        if store_dir is None:
            store_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvloom-demo-"))) / "store"
        scores, cases = measure(options, store_dir, restarted=False)
        rows = [s.summary(scores[0]) for s in scores]
        console.print(_intro(cases))
        console.print(_console_table("Documents precomputed once, then fused from host memory", rows))
        again = _restarted(options, store_dir)
        console.print(_console_table("After a process restart: every chunk from the disk, past the page cache", again))
        console.print(_LEGEND, style="dim")
        if options.question is not None:
            _print_answers(options, scores, console)
        phases = {"first run": rows, "after restart": again}
        table = [{"phase": phase} | asdict(row) for phase, phase_rows in phases.items() for row in phase_rows]
        result = BenchResult("demo", _metrics(phases), table)
        if options.json is not None:
            result.write(options.json)
        if options.report is not None:
            write_text(options.report, _page(options, rows, again, store_dir))
            console.print(f"report: {options.report}")


def _restarted(options: DemoOptions, store_dir: Path) -> list[Summary]:
    """The same measurement in a fresh process over the same store."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    with tempfile.TemporaryDirectory(prefix="kvloom-demo-") as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"{__package__}.restart", json.dumps(asked), str(store_dir), str(out)]
        subprocess.run(command, check=True)
        return [Summary(**row) for row in json.loads(out.read_text())]


def _intro(cases: Sequence[Case]) -> str:
    kinds: dict[str, int] = {}
    for case in cases:
        kinds[case.kind] = kinds.get(case.kind, 0) + 1
    names = {
        "record": "records (an entity is named in one document, its code stands in the next)",
        "alias": "aliases (two hops over two documents)",
        "question": "questions over documents as they are",
    }
    return "Asked: " + "; ".join(f"{n} {names.get(kind, kind)}" for kind, n in kinds.items())


def _console_table(title: str, rows: Sequence[Summary]) -> ConsoleTable:
    table = ConsoleTable(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


_COLUMNS = ("method", "TTFT ms", "speed-up", "computed", "loaded", "exact", "KL nats")
_LEGEND = (
    "TTFT: time to first token, from the request's tokens to the answer's first, median. Speed-up: full prefill's time "
    "over it, question by question. Computed: tokens that ran through a layer, mean over layers. Loaded: from where. "
    "Exact: questions with a known answer that were answered word for word. KL: of the next-token distribution to that "
    "of full prefill."
)


def _cells(row: Summary) -> list[str]:
    return [
        row.method,
        f"{row.ttft_s * 1e3:.0f}",
        f"{row.speedup:.2f}x",
        f"{row.computed_tokens:,.0f}",
        " + ".join(f"{size / 1e6:.1f} MB {tier}" for tier, size in row.loaded_bytes.items()) or "-",
        "-" if row.exact_match is None else f"{row.exact_match:.0%}",
        f"{row.kl:.4f}",
    ]


def _print_answers(options: DemoOptions, scores: Sequence[Score], console: Console) -> None:
    _, tokenizer = load_model(options.model)
    for s in scores:
        text = str(tokenizer.decode(list(s.outcomes[0].tokens), skip_special_tokens=True))
        console.print(f"  {s.method.name:>18}: {text.strip()!r}", markup=False, highlight=False)


def _metrics(phases: Mapping[str, Sequence[Summary]]) -> dict[str, Metric]:
    found = {}
    for phase, rows in phases.items():
        for row in rows:
            name = f"{row.method} {phase}".replace(" ", "_")
            found[f"ttft_s_{name}"] = Metric(row.ttft_s, row.ttft_s_p10, row.ttft_s_p90, "s", rows[0].ttft_s)
            if row.exact_match is not None:
                found[f"exact_match_{name}"] = Metric(row.exact_match, unit="share", baseline=rows[0].exact_match)
    return found


def _page(
    options: DemoOptions,
    rows: Sequence[Summary],
    again: Sequence[Summary],
    store_dir: Path,
) -> str:
    curves = sweep(options, store_dir)
    return html_report(
        "kvloom: a question over cached documents",
        [
            Section(
                "Every method side by side",
                _LEGEND,
                [
                    Table(_COLUMNS, [_cells(r) for r in rows], "First run: chunks in host memory"),
                    Table(_COLUMNS, [_cells(r) for r in again], "After a process restart: chunks on disk"),
                ],
            ),
            Section("Time against the number of cached documents", "", [curves[0]]),
            Section("Quality against the share of tokens recomputed", "", [curves[1]]),
        ],
    )


def sweep(options: DemoOptions, store_dir: Path) -> tuple[Plot, Plot]:
    """TTFT against the number of chunks, and exact match against the recompute ratio."""
    model, tokenizer = load_model(options.model)
    texts = None if options.docs is None else read_documents(options.docs)
    count_tokens = token_counter(tokenizer)
    times: dict[str, list[Point]] = {}
    quality: dict[str, list[Point]] = {}
    with KVStore([HostTier(HOST_BYTES), DiskTier(store_dir)]) as store:
        connector = TransformersConnector(model, tokenizer, store)
        longest = connector.layers.max_tokens - 128
        for chunks in (2, 4, 8) if options.quick else (2, 4, 8, 16):
            context = min(chunks * (128 if options.quick else 512), longest)
            cases = task_cases(
                texts, count_tokens, kind="record", count=3, context_tokens=context, num_documents=chunks, seed=1
            )
            connector.precompute([d for case in cases for d in case.documents])
            for s in score(connector, cases, [FULL, PREFIX, NAIVE, blend(0.15)]):
                middle, low, high = (1e3 * t for t in spread([o.ttft_s for o in s.outcomes]))
                times.setdefault(s.method.name, []).append(Point(chunks, middle, low, high))
        cases = task_cases(
            texts,
            count_tokens,
            kind="record",
            count=4 if options.quick else 24,
            context_tokens=min(1024, longest),
            seed=2,
        )
        connector.precompute([d for case in cases for d in case.documents])
        ratios = (0.0, 0.05, 0.15, 1.0) if options.quick else (0.0, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5, 1.0)
        for selector in ("deviation", "first", "random"):
            methods: list[Method] = [FULL, *(blend(ratio, selector) for ratio in ratios)]
            for ratio, s in zip(ratios, score(connector, cases, methods)[1:], strict=True):
                share = Metric.of_share(sum(s.known), len(s.known))
                name = "CacheBlend" if selector == "deviation" else f"{selector} tokens"
                quality.setdefault(name, []).append(Point(ratio, share.value, share.low, share.high))
    return (
        Plot("documents", "TTFT, ms", times, "Documents of equal length; the band is the 10th to 90th percentile."),
        Plot("recompute ratio", "exact match", quality, "Cross-document records; the band is the 95 % interval."),
    )
