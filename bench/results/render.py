"""Renders `docs/benchmarks.md` from the last full run of every benchmark.

    python -m kvloom.bench.results.render [--model NAME] [RESULT.json ...]

Results that are named, as `--json` wrote them, first replace those of their benchmarks in this folder, without their
raw rows. Those of `--model DIR` are kept apart under a name, for instance smollm2-135m, and come first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...evaluation.environment import ROOT
from ...evaluation.page import cell_text
from ...evaluation.report import Metric, Target, write_text

RESULTS = Path(__file__).parent
PAGE = ROOT / "docs" / "benchmarks.md"
ORDER = ("blend", "tiers", "retrieval", "vllm", "vllm-long", "codecs", "simulate")  # others follow by name
ON = "-on-"  # between a benchmark and a pretrained model in the names of files
COMMANDS = {"simulate": "kvloom simulate TRACE.jsonl", "vllm-long": "kvloom bench vllm --long"}
INTRODUCTION = """# Benchmarks

Made from `bench/results/*.json` by `make docs`; do not edit. Each section is one run; every figure stands beside its
alternative from the same run. Absolute times depend on the machine; ratios travel better. Times are medians between
their 10th and 90th percentile; shares and losses have 95 % intervals.

Sections that name a model are of that pretrained model, and their figures of quality are the ones to go by. The others
are of the bundled model: six layers, trained for these very tasks and initialised so that facts bind where CacheBlend
looks; it is a fast test bed, and its figures of quality do not carry over to other models.
To repeat a run and to put it here:

```sh
kvloom bench NAME --json new.json
.venv/bin/python -m kvloom.bench.results.render new.json
kvloom bench NAME --model build/real-model --json real.json
.venv/bin/python -m kvloom.bench.results.render --model smollm2-135m real.json
```
"""

Json = Mapping[str, Any]


def take_in(path: Path, folder: Path = RESULTS, *, model: str | None = None) -> None:
    """Replace the result of the same benchmark, on the same model, in `folder`, without raw rows.

    Parameters
    ----------
    model : a name for the pretrained model that was measured; None for the bundled one.

    Raises
    ------
    ValueError : the file is no result, or it is of changed files that no commit names.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        name, commit = str(result["bench"]), str(result["commit"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of a benchmark; expected a file that --json wrote") from error
    if commit.endswith("-dirty"):
        raise ValueError(f"{path} was measured with uncommitted changes ({commit}); commit, and run it again")
    result.pop("rows", None)
    stem = name if model is None else f"{name}{ON}{model}"
    write_text(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")


def render(folder: Path = RESULTS) -> str:
    """The whole page."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return "\n".join([INTRODUCTION, *(_section(results[stem], stem.partition(ON)[2]) for stem in _ordered(results))])


def _ordered(stems: Iterable[str]) -> list[str]:
    """By benchmark; of each the pretrained models first."""

    def place(stem: str) -> tuple[int, str, bool, str]:
        bench, _, model = stem.partition(ON)
        return ORDER.index(bench) if bench in ORDER else len(ORDER), bench, not model, model

    return sorted(stems, key=place)


def _section(result: Json, model: str) -> str:
    title, on = result.get("title") or "Figures", f" on {model}" if model else ""
    parts = [f"## {result['bench']}{on}: {title[0].lower()}{title[1:]}", _origin(result, model)]
    metrics = {name: Metric(**fields) for name, fields in result["metrics"].items()}
    targets = [Target(**fields) for fields in result.get("targets", ())]
    parts.append(_figures(metrics, targets))
    for table in result.get("tables", ()):
        shown = _table(table["columns"], table["rows"], table.get("left", (0,)))
        parts.append(f"**{_escaped(table['caption'])}**\n\n{shown}" if table["caption"] else shown)
    parts += [_escaped(note) for note in result.get("notes", ())]
    return "\n\n".join(parts) + "\n"


def _origin(result: Json, model: str) -> str:
    """Command, commit, machine; or where figures were copied from, if the run's own file was not kept."""
    env = result["env"]
    name = str(result["bench"])
    command = COMMANDS.get(name, f"kvloom bench {name}")
    facts = [f"`{command} --model DIR`" if model else f"`{command}`"]
    if result.get("source"):
        facts.append(f"**copied from {result['source']}**")
    if result["commit"]:
        facts.append(f"commit `{result['commit'][:12]}`")
    if env.get("date"):
        facts.append(str(env["date"])[:10])
    machine = [str(env[name]) for name in ("cpu",) if env.get(name)]
    machine += [f"{env['cores']} cores"] if env.get("cores") else []
    machine += [f"{int(env['memory_bytes']) / 2**30:.0f} GiB"] if env.get("memory_bytes") else []
    machine += [str(device["name"]) for device in env.get("devices") or ()] or ["no GPU"]
    facts.append(", ".join(machine))
    facts += [f"{name} {env[name]}" for name in ("torch", "transformers") if env.get(name)]
    return " · ".join(facts)


def _figures(metrics: Mapping[str, Metric], targets: Sequence[Target]) -> str:
    """Targets beside results first, then figures without a target."""
    rows = []
    for target in targets:
        metric = metrics.get(target.metric)
        bound = f"{target.sign} {target.bound:g}"
        if metric is None or metric.value is None:
            why = metric.baseline if metric is not None and isinstance(metric.baseline, str) else ""
            rows.append([target.metric, "-", "", bound, f"not measured {why}".strip()])
        else:
            verdict = "reached" if target.reached(metric.value) else "**not reached**"
            rows.append([target.metric, *_cells(metric), bound, verdict])
    known = {target.metric for target in targets}
    rows += [[name, *_cells(metric), "", ""] for name, metric in metrics.items() if name not in known]
    return _table(["figure", "result", "beside", "target", "verdict"], rows, left=(0, 2, 4), is_marked_up=True)


def _cells(metric: Metric) -> list[str]:
    if metric.value is None:
        return ["-", str(metric.baseline or "")]
    interval = "" if metric.low is None or metric.high is None else f" ({metric.low:.3g} to {metric.high:.3g})"
    beside = metric.baseline if isinstance(metric.baseline, str) else ""
    if isinstance(metric.baseline, int | float):
        beside = f"{metric.baseline:.4g}"
    unit = f" {metric.unit}" if metric.unit not in {"", "share"} else ""
    return [f"{metric.value:.4g}{unit}{interval}", _escaped(beside)]


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = (0,), *, is_marked_up: bool = False
) -> str:
    lines = [columns, ["---" if i in left else "---:" for i in range(len(columns))]]
    lines += [[cell if is_marked_up else _escaped(cell_text(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Marks mean themselves, but for code between backticks."""
    plain_and_code = text.split("`")
    return "`".join(re.sub(r"([\\|*_<>])", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(plain_and_code))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULT.json")
    parser.add_argument("--model", metavar="NAME", help="of the pretrained model that the results are of")
    given = parser.parse_args()
    for path in given.results:
        take_in(path, model=given.model)
    write_text(PAGE, render())


if __name__ == "__main__":
    main()
