"""Token sequences that a model is calibrated with: out of text, and of random strings."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import torch

try:
    from transformers import PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError('kvloom.evaluation.windows needs transformers: pip install "kvloom[transformers]"') from error

from ..connectors.identity.requests import lead_of

SEQUENCES, SEQUENCE_TOKENS = 8, 2048  # KVQuant, section 4, has 16 of them
GRADIENT_SEQUENCES = 2  # of them: what errors cost is much the same everywhere, and gradients take most of the time
LEAST_TOKENS = 512  # of a text; from less nothing is learned that holds for another
STRINGS_RATIO = 0.25  # tokens of random strings for each token of text: A2ATS has 16K for 64K


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sequences: int = SEQUENCES,
    tokens: int = SEQUENCE_TOKENS,
    least_tokens: int = LEAST_TOKENS,
) -> list[list[int]]:
    """Token sequences out of texts, each behind the model's own BOS if it has one, spread evenly over what there is.

    Parameters
    ----------
    sequences : at most so many; fewer if the text is short.
    tokens : of each, BOS included; a text that is shorter gives one sequence of its length.

    Raises
    ------
    ValueError : too little text.
    """
    if sequences < 1 or tokens < 2:
        raise ValueError(f"{sequences} sequences of {tokens} tokens; expected at least 1 of at least 2")
    ids = [
        token
        for text in texts
        for token in tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    ]
    if len(ids) < least_tokens:
        raise ValueError(f"the text has {len(ids)} tokens; expected at least {least_tokens}: give more --text")
    lead = list(lead_of(tokenizer))
    width = min(tokens - len(lead), len(ids))
    count = min(sequences, len(ids) // width)
    last = len(ids) - width
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return [lead + ids[start : start + width] for start in starts]


def string_windows(
    tokenizer: PreTrainedTokenizerBase, *, sequences: int, tokens: int = SEQUENCE_TOKENS, seed: int = 0
) -> list[list[int]]:
    """Token sequences of random UUIDs between commas, each behind the model's own BOS if it has one.

    They teach a codebook what keys of identifiers look like, of which text has few (A2ATS, arXiv 2502.12665). Equal
    seeds give equal sequences.
    """
    if sequences < 0 or tokens < 2:
        raise ValueError(f"{sequences} sequences of {tokens} tokens; expected at least 0 of at least 2")
    drawn, lead = torch.Generator().manual_seed(seed), list(lead_of(tokenizer))
    found = []
    for _ in range(sequences):
        ids: list[int] = []
        while len(ids) < tokens:
            numbers = torch.randint(256, (64, 16), generator=drawn).tolist()
            strings = "".join(f"{uuid.UUID(bytes=bytes(number), version=4)}, " for number in numbers)
            ids += tokenizer(strings, add_special_tokens=False, verbose=False).input_ids
        found.append((lead + ids)[:tokens])
    return found
