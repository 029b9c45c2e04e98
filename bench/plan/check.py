"""Are the plans right? `kvloom bench plan`: predicted beside measured, on this machine.

Times to first token of the bundled model through `TransformersConnector`, over lengths, tiers, codecs and fusion,
beside what `kvloom plan --gpu here` says of a model of its shape; and hits beside those of `kvloom simulate`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...blend.blender import Blender
from ...compress.registry import codec_by_name
from ...connectors.hf.connector import TransformersConnector
from ...connectors.hf.generation import cache_argument
from ...evaluation.environment import BUNDLED_MODEL
from ...evaluation.models import load_model
from ...evaluation.page import Plot, Point, Row, Table
from ...evaluation.passages import load_questions
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..eviction.simulate import SimulateOptions, simulate
from ..harness.page_cache import drop_page_cache
from .anchors import anchor_table
from .here import here_machine
from .machines import Assumptions, TierPlan
from .predict import Predictor, Way
from .request import loaded_time
from .setup import Machine, Setup, measured_forms
from .shapes import ModelShape, read_shape
from .traffic import Traffic, Zipf

COMPUTE = "compute"
DOCUMENT_TOKENS, QUESTION_TOKENS = 256, 64
TITLE = "Does a machine do what a plan says of it?"
MEANING = (
    "Predicted: by `kvloom plan --gpu here`, from the speeds that `kvloom doctor` shows and from passes of a model of "
    "the same shape with random weights. Measured: the bundled model through `TransformersConnector`, documents of 256 "
    "tokens fused from the store at ratio 0 or 0.15, or computed in full; from the disk past the page cache. Off by: "
    "the difference over what was measured. Hits: the plan's beside those that `kvloom simulate` counts. Published "
    "times are of other machines and software."
)
TARGETS = (Target("planner_ttft_error", "<=", 0.25), Target("planner_hit_error", "<=", 0.0))


@dataclass(frozen=True, slots=True)
class Case:
    """Documents that are computed, or come from a tier under a codec and are fused at a ratio."""

    documents: int
    tier: str = COMPUTE
    codec: str = "raw"
    ratio: float = 0.0


def cases(*, quick: bool) -> list[Case]:
    """What is measured."""
    found = []
    for documents in (2, 4) if quick else (4, 12, 24):
        found.append(Case(documents))
        for tier in ("host", "disk"):
            found += [Case(documents, tier, codec) for codec in (("raw", "int4") if quick else ("raw", "int8", "int4"))]
        found.append(Case(documents, "host", "raw", 0.15))
    return found


class _Bed:
    """The bundled model over stores that hold the same documents."""

    def __init__(self, stack: ExitStack, folder: Path, wanted: Sequence[Case]) -> None:
        model, tokenizer = load_model(None)
        self.connectors: dict[tuple[str, str], tuple[TransformersConnector, Path]] = {}
        text = "\n".join(passage for question in load_questions() for passage in question.passages)
        most = max(case.documents for case in wanted)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        rows = [ids[i * DOCUMENT_TOKENS : (i + 1) * DOCUMENT_TOKENS] for i in range(most)]
        self.documents, self.question = rows, ids[-QUESTION_TOKENS:]
        for tier, codec in {(case.tier, case.codec) for case in wanted if case.tier != COMPUTE}:
            place = folder / f"{tier}-{codec}"
            tiers = [HostTier(None) if tier == "host" else DiskTier(place)]
            store = stack.enter_context(KVStore(tiers, codec=codec_by_name(codec), allow_uncertified=True))
            connector = TransformersConnector(model, tokenizer, store, model_id="plan")
            connector.fuse(rows, blender=Blender(0.0))  # computes and stores them
            self.connectors[tier, codec] = connector, place
        self.any = next(iter(self.connectors.values()))[0]

    @torch.no_grad()
    def ttft_s(self, case: Case) -> float:
        """Seconds from the request's tokens to the first token of the answer."""
        rows = self.documents[: case.documents]
        if case.tier == COMPUTE:
            connector = self.any
            began_s = time.perf_counter()
            flat = [*connector.lead_ids, *(token for row in rows for token in row), *self.question]
            self._forward(connector, torch.tensor([flat]), None)
            return time.perf_counter() - began_s
        connector, place = self.connectors[case.tier, case.codec]
        if case.tier == "disk":
            drop_page_cache(place)
        blender = replace(Blender(), recompute_ratio=case.ratio)
        began_s = time.perf_counter()
        context = connector.fuse(rows, question_ids=self.question if case.ratio else None, blender=blender)
        inputs, cache = connector.as_inputs(context, self.question)
        self._forward(connector, inputs["input_ids"][:, cache.get_seq_length() :], cache)
        return time.perf_counter() - began_s

    def _forward(self, connector: TransformersConnector, ids: torch.Tensor, cache: object) -> None:
        held = {} if cache is None else {cache_argument(): cache}
        int(connector.model(ids, logits_to_keep=1, **held).logits[0, -1].argmax())


def predicted_s(setup: Setup, case: Case) -> float:
    """What the plan says of a case."""
    if case.tier == COMPUTE:
        return setup.machine.prefill.seconds(case.documents * DOCUMENT_TOKENS + QUESTION_TOKENS)
    return sum(loaded_time(setup, case.tier, case.codec, case.documents, QUESTION_TOKENS, case.ratio))


def run(*, quick: bool = False, folder: Path = Path()) -> BenchResult:
    """Predict and measure; in turns, so that a busy moment of the machine meets all cases."""
    wanted = cases(quick=quick)
    with ExitStack() as stack, progress() as bar:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="kvloom-plan-")))
        bed = _Bed(stack, place, wanted)
        rounds = 2 if quick else 5
        task = bar.add_task("measuring", total=rounds + 1)
        setups, times = list[Setup](), {case: list[float]() for case in wanted}
        for number in range(rounds + 1):
            setups.append(_setup(wanted, folder))  # in turns with what it is to predict
            for case in wanted:
                spent_s = bed.ttft_s(case)
                if number:
                    times[case].append(spent_s)
            bar.advance(task)
    measured = {case: statistics.median(found) for case, found in times.items()}
    predicted = {case: statistics.median([predicted_s(each, case) for each in setups]) for case in wanted}
    return _result(measured, predicted, setups[-1], *_hit_errors(setups[-1]))


def _setup(wanted: Sequence[Case], folder: Path) -> Setup:
    assume = Assumptions(question_tokens=QUESTION_TOKENS, chunk_tokens=DOCUMENT_TOKENS)
    shape: ModelShape = read_shape(str(BUNDLED_MODEL), dtype="float32")
    machine: Machine = here_machine(shape, folder, tiers=["host", "disk"], assume=assume)
    tiers = [TierPlan("host", 1 << 30, float("inf"), 0.0), TierPlan("disk", 1 << 30, 1e9, 0.0)]
    codecs = list(dict.fromkeys(case.codec for case in wanted))
    return Setup(shape, machine, tiers, measured_forms(shape, codecs, DOCUMENT_TOKENS), assume)


def _hit_errors(setup: Setup) -> tuple[list[Row], float]:
    """Hits that a plan counts, beside those that `kvloom simulate` counts for as many blocks."""
    traffic = Traffic("zipf", Zipf(400, 0.9, DOCUMENT_TOKENS, 3, 64, 16, 600, 2.0, 7).draw(), DOCUMENT_TOKENS, False)
    prefixes = traffic.as_prefixes()
    numbers: dict[bytes, int] = {}
    rows: list[Row] = []
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="kvloom-plan-") as folder:
        trace = Path(folder) / "trace.jsonl"
        with trace.open("w") as file:
            for request in prefixes.requests:
                ids = [numbers.setdefault(key, len(numbers)) for key in request.keys]
                fields = {"timestamp": request.arrival_s * 1e3, "input_length": request.input_tokens}
                file.write(json.dumps(fields | {"output_length": 1, "hash_ids": ids}) + "\n")
        for policy in ("default", "lru"):
            for blocks in (len(numbers) // 20, len(numbers) // 4):
                tier = TierPlan("host", blocks * setup.forms["raw"].bytes_in("host"), float("inf"), 0.0)
                planned = Predictor(replace(setup, tiers=[tier]), traffic, policy=policy).hits(Way(("host",)))
                share = sum(map(sum, planned)) / traffic.blocks
                found = simulate(SimulateOptions(trace, [(blocks + 0.5) / len(numbers)], policies=[policy]))
                theirs = next(float(str(row["hit_ratio"])) for row in found.rows if row["policy"] == policy)
                worst = max(worst, abs(share - theirs))
                rows.append([policy, blocks, f"{share:.4f}", f"{theirs:.4f}"])
    return rows, worst


def _result(
    measured: Mapping[Case, float], predicted: Mapping[Case, float], setup: Setup, hits: list[Row], hit_error: float
) -> BenchResult:
    errors = {case: abs(predicted[case] - measured[case]) / measured[case] for case in measured}
    cells: list[Row] = []
    rows: list[dict[str, object]] = []
    series: dict[str, list[Point]] = {}
    for case, seconds in measured.items():
        tokens = case.documents * DOCUMENT_TOKENS + QUESTION_TOKENS
        way = "-" if case.tier == COMPUTE else f"{case.codec}, fused at {case.ratio:g}"
        times = [f"{seconds * 1e3:.1f}", f"{predicted[case] * 1e3:.1f}"]
        cells.append([case.tier, way, f"{tokens:,}", *times, f"{predicted[case] / seconds - 1:+.0%}"])
        rows.append({"tier": case.tier, "codec": case.codec, "ratio": case.ratio, "tokens": tokens})
        rows[-1] |= {"measured_s": seconds, "predicted_s": predicted[case]}
        name = case.tier if case.tier == COMPUTE else f"{case.tier}, {case.codec}, {case.ratio:g}"
        series.setdefault(name, []).append(Point(1e3 * predicted[case], 1e3 * seconds))
    tables = [
        Table(
            ["from", "way", "tokens", "measured ms", "predicted ms", "off by"],
            cells,
            "time to first token",
            left=(0, 1),
        ),
        Table(["policy", "blocks that fit", "planned", "simulated"], hits, "hit ratio"),
        anchor_table(),
    ]
    metrics = {
        "planner_ttft_error": Metric.of_samples(
            list(errors.values()), unit="share of the measured time", baseline="median of all cases"
        ),
        "planner_hit_error": Metric(hit_error, unit="share of block references", baseline="kvloom simulate"),
    }
    plot = Plot("predicted, ms", "measured, ms", series, "Measured over predicted.", log_x=True, log_y=True)
    return BenchResult("plan", metrics, rows, tables, [plot], TARGETS, [MEANING], TITLE)
