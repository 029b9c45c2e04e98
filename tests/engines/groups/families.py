"""The table of docs/models.md, made from the families that these tests run.

`python -m kvloom.tests.engines.groups.families` writes it anew.
"""

from pathlib import Path

from kvloom.bench.vllm.families import FAMILIES

PRESSED = {title: family for title, family in FAMILIES.items() if family.blocks is not None}
"""Models whose requests have to give way to one another."""

PLAIN = {title: family for title, family in FAMILIES.items() if title not in PRESSED}
"""All others, of one KV cache group of full attention."""

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_BEGIN, _END = "<!-- vllm: begin -->", "<!-- vllm: end -->"
_KINDS = {
    "latent": "latent attention",
    "full": "full attention",
    "window": "sliding window",
    "local": "chunked local attention",
    "state": "states",
}


def section() -> str:
    """The table of docs/models.md."""
    lines = ["| family | layers | prefix | fusion |", "|---|---|---|---|"]
    for title, family in FAMILIES.items():
        layers = "one group" if family.groups == ("full",) else ", ".join(_KINDS[group] for group in family.groups)
        lines.append(f"| {title} | {layers} | exact | {'exact at ratio 1' if family.fuses else 'off'} |")
    return "\n".join(lines)


def committed() -> str:
    """The table as docs/models.md has it."""
    return PAGE.read_text().split(_BEGIN)[1].split(_END)[0].strip()


def write() -> None:
    """Put the table into docs/models.md."""
    text = PAGE.read_text()
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n\n{section()}\n\n{_END}{after}")


if __name__ == "__main__":
    write()
