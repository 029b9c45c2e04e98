"""What hardware would do for long contexts, before it is bought: `kvloom plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...evaluation.environment import BUNDLED_MODEL
from ...evaluation.page import Plot
from ...evaluation.report import BenchResult, Metric
from ...evaluation.screen import progress
from ..eviction.policies import SIMULATED_POLICIES
from .machines import DEFAULT_TIERS, HERE, Assumptions, read_tier
from .predict import Outcome, Predictor, ways
from .request import request_rows, request_table, ttft_plot
from .scale import Pool, scale_tables
from .setup import Machine, Setup, measured_forms, named_machine
from .shapes import read_shape
from .tables import answer_notes, assumption_table, byte_table, capacity_table, decode_table, traffic_tables
from .traffic import Traffic, read_traffic

TITLE = "What would this hardware do for these contexts?"
DEFAULT_CODECS = ("raw", "int4")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is planned.

    Attributes
    ----------
    model : see `read_shape`; `reference` for the bundled model.
    context_tokens : of a prompt.
    gpu : see `gpu_by_name`, or `here`.
    gpus : of an engine, by tensor parallelism.
    tiers : see `read_tier`.
    codecs : names, see `codec_by_name`.
    traffic : see `read_traffic`; None for a single request.
    policy : of eviction.
    engines : see `Predictor`.
    prices : of an hour of a GPU (`gpu`), and of a GB in a tier by its name.
    profile : of the model, for codecs that need one.
    dtype : see `read_shape`.
    folder : whose disk is measured for `here`.
    pool : machines that share chunks, see `Pool`.
    """

    model: str
    context_tokens: int
    gpu: str = HERE
    gpus: int = 1
    tiers: Sequence[str] = DEFAULT_TIERS
    codecs: Sequence[str] = DEFAULT_CODECS
    traffic: str | None = None
    policy: str = "default"
    engines: int | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    assume: Assumptions = field(default_factory=Assumptions)
    profile: Path | None = None
    dtype: str | None = None
    folder: Path = Path()
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.context_tokens < self.assume.chunk_tokens + self.assume.question_tokens:
            least = int(self.assume.chunk_tokens + self.assume.question_tokens)
            raise ValueError(
                f"context is {self.context_tokens} tokens; expected a chunk and a question, {least}, at least"
            )
        if self.policy not in SIMULATED_POLICIES:
            raise ValueError(f"policy is {self.policy!r}; expected one of {', '.join(SIMULATED_POLICIES)}")
        if self.engines is not None and self.engines < 1:
            raise ValueError(f"engines is {self.engines}; expected at least 1")
        if self.gpus < 1 or (self.gpus > 1 and self.gpu == HERE):
            raise ValueError(f"gpus is {self.gpus}; expected at least 1, and 1 for {HERE}")
        if not self.codecs or len(set(self.codecs)) < len(self.codecs):
            raise ValueError(f"codecs are {', '.join(self.codecs) or 'none'}; expected at least one, each once")
        names = [read_tier(text).name for text in self.tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tiers are {', '.join(names) or 'none'}; expected at least one, each once")
        if unknown := self.prices.keys() - {"gpu", *names}:
            raise ValueError(f"there are prices of {', '.join(sorted(unknown))}; expected of gpu, {', '.join(names)}")


def plan(options: PlanOptions) -> BenchResult:
    """Predict bytes, capacities, times and costs.

    Raises
    ------
    ValueError : an option cannot be read, a trace is none, or the model does not fit.
    """
    traffic = None if options.traffic is None else read_traffic(options.traffic)
    with progress() as bar:
        task = bar.add_task("measuring", total=None, logged=False)
        setup = setup_of(options)
        bar.remove_task(task)
        outcomes: list[Outcome] = []
        if traffic is not None:
            predictor = Predictor(setup, traffic, policy=options.policy, engines=options.engines)
            chosen = list(ways(setup, traffic))
            task = bar.add_task(f"{len(chosen)} ways", total=len(chosen))
            for way in chosen:
                outcomes.append(predictor.outcome(way))
                bar.advance(task)
    return _result(options, setup, traffic, outcomes)


def setup_of(options: PlanOptions) -> Setup:
    """The model, the machine and the forms of chunks that the options mean; `here` and samples need transformers."""
    model = str(BUNDLED_MODEL) if options.model == "reference" else options.model
    dtype = options.dtype
    if dtype is None and options.gpu == HERE:
        dtype = _dtype_here()
    shape, tokens = replace(read_shape(model, dtype=dtype), name=options.model), int(options.assume.chunk_tokens)
    tiers = [read_tier(text) for text in options.tiers]
    machine: Machine
    if options.gpu == HERE:
        from .here import here_machine

        machine = here_machine(shape, options.folder, tiers=[tier.name for tier in tiers], assume=options.assume)
    else:
        machine = named_machine(shape, options.gpu, options.assume, options.gpus)
    sample = None
    if any(Path(model).expanduser().glob("*.safetensors")):
        from .here import sample_of

        sample = sample_of(model, shape, tokens)
    forms = measured_forms(shape, options.codecs, tokens, profile=options.profile, sample=sample)
    return Setup(shape, machine, tiers, forms, options.assume)


def _dtype_here() -> str | None:
    """As kvloom loads models: in float32 on a processor, as they are on a GPU."""
    import torch

    return None if torch.cuda.is_available() else "float32"


def _result(options: PlanOptions, setup: Setup, traffic: Traffic | None, outcomes: Sequence[Outcome]) -> BenchResult:
    context = options.context_tokens
    requests = request_rows(setup, context)
    tables = [request_table(requests, context, setup)]
    plots: list[Plot] = [ttft_plot(setup, context)]
    rows: list[dict[str, object]] = [{"subject": "request", **each.as_row()} for each in requests]
    metrics = {
        "token_bytes": Metric(setup.shape.spec().token_bytes, unit="bytes"),
        "ttft_computed_s": Metric(requests[0].seconds, unit="s"),
        "ttft_best_s": Metric(min(each.seconds for each in requests), unit="s", baseline=requests[0].seconds),
    }
    notes = answer_notes(setup, requests, context, outcomes, options.prices, options.gpus)
    if traffic is not None:
        found, drawn, more = traffic_tables(setup, traffic, outcomes, options.prices, options.gpus)
        tables, plots, rows = [*found, *tables], [*drawn, *plots], [*rows, *more]
        for outcome in outcomes:
            if outcome.way.is_cached:
                name = "_".join((*outcome.way.tiers, outcome.way.codec, outcome.way.reuse))
                metrics[f"hit_ratio_{name}"] = Metric(outcome.hit_ratio, unit="share of block references")
            else:
                name = "none"
            metrics[f"ttft_p50_s_{name}"] = Metric(outcome.ttft_s[0], unit="s", baseline=outcomes[0].ttft_s[0])
    if options.pool is not None:
        found, more = scale_tables(setup, options.pool)
        tables, rows = [*tables, *found], [*rows, *more]
    tables += [byte_table(setup), capacity_table(setup, context)]
    if setup.machine.hbm_bytes_s:
        tables.append(decode_table(setup, context))
    tables.append(assumption_table(setup))
    return BenchResult("plan", metrics, rows, tables, plots, notes=notes, title=TITLE)
