"""Outlier channels for a model that has none: a stressed copy that computes the same function.

    python -m kvloom.bench.codecs.outliers MODEL_DIR OUT_DIR

Small models have nearly Gaussian keys and values, on which any quantiser looks good. Large ones have channels that are
10 to 30 times the median (KVQuant, arXiv 2401.18079, section 3.1). Here some channels are multiplied by s and whoever
reads them by 1/s; s is a power of two, so that no mantissa changes. Label results on such a model as stress.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PEAK = 32.0  # largest factor; the smallest of an outlier is 8


def outlier_factors(count: int, *, outlier_ratio: float, generator: torch.Generator) -> Tensor:
    """Powers of two, `[count]`: 1 for most, 8 to 32 (log-normal around 16) for `outlier_ratio` of them, or for one."""
    outliers = max(1, round(count * outlier_ratio))
    exponents = torch.normal(4.0, 0.7, (outliers,), generator=generator).round().clamp(3.0, math.log2(PEAK))
    factors = torch.ones(count)
    factors[torch.randperm(count, generator=generator)[:outliers]] = torch.exp2(exponents)
    return factors


@torch.no_grad()
def inject_outliers(model: LlamaForCausalLM, *, seed: int = 0, outlier_ratio: float = 0.05) -> LlamaForCausalLM:
    """Rescale key and value channels of every layer in place, and return the model; its function stays the same.

    Keys: rows i and i + D/2 of a KV head, which rotary embedding mixes, times s; the same rows of its G query heads
    times 1/s. Values: a row times s; the column of the output projection, in all G heads, times 1/s.

    Parameters
    ----------
    seed : equal seeds give equal channels and factors.
    outlier_ratio : share of a KV head's rotary pairs, and of its value channels, that become outliers.

    Raises
    ------
    ValueError : biases in the attention projections, or a ratio outside 0 to 1.
    """
    if not 0.0 < outlier_ratio <= 1.0:
        raise ValueError(f"outlier_ratio is {outlier_ratio}; expected above 0 and at most 1")
    if model.config.attention_bias:
        raise ValueError("attention_bias is true; expected projections without bias")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention = layer.self_attn
        dim, group = attention.head_dim, attention.num_key_value_groups
        for head in range(attention.k_proj.out_features // dim):
            own = slice(head * dim, (head + 1) * dim)
            pairs = outlier_factors(dim // 2, outlier_ratio=outlier_ratio, generator=generator)
            channels = outlier_factors(dim, outlier_ratio=outlier_ratio, generator=generator)
            attention.k_proj.weight[own] *= pairs.repeat(2)[:, None]
            attention.v_proj.weight[own] *= channels[:, None]
            readers = slice(head * group * dim, (head + 1) * group * dim)
            attention.q_proj.weight[readers] /= pairs.repeat(2 * group)[:, None]
            attention.o_proj.weight[:, readers] /= channels.repeat(group)
    return model


def export_stressed(source: Path, target: Path, *, seed: int = 0) -> None:
    """Write a stressed copy of the model folder `source` to `target`, complete or not at all.

    Raises
    ------
    FileExistsError : `target` is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; expected a folder to be made")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        folder = Path(work) / "model"
        inject_outliers(LlamaForCausalLM.from_pretrained(source, dtype="auto"), seed=seed).save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(folder)
        folder.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    export_stressed(args.model, args.out, seed=args.seed)


if __name__ == "__main__":
    main()
