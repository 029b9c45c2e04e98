"""Prompts as callers give them: texts or token ids, in lists, tensors, arrays or a tokenizer's output."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from .documents import valid_text

TokenIds: TypeAlias = "Sequence[int] | Tensor | np.ndarray[Any, Any]"
Prompt: TypeAlias = "str | TokenIds"
Prompts: TypeAlias = "Prompt | Sequence[Prompt] | Mapping[str, Any]"


def prompt_rows(prompts: object, *, vocabulary: int) -> list[str | list[int]]:
    """One text or one list of token ids for each sequence.

    Parameters
    ----------
    prompts : one prompt, or several. A one-dimensional tensor or array is one prompt, a two-dimensional one has a
        prompt in each row. A mapping is a tokenizer's output: `input_ids` and, where rows are padded, `attention_mask`.
    vocabulary : number of token ids that the model knows.

    Raises
    ------
    TypeError : neither text nor token ids; the message names the prompt.
    ValueError : no prompts, a token id that the model does not know, or a text that is no valid Unicode.
    """
    rows, is_one = _rows(prompts)
    if not rows:
        raise ValueError("prompts is empty; give at least one")
    names = ["prompts"] if is_one else [f"prompts[{i}]" for i in range(len(rows))]
    return [
        valid_text(row, name) if isinstance(row, str) else token_ids(row, name, vocabulary=vocabulary)
        for row, name in zip(rows, names, strict=True)
    ]


def token_ids(row: object, name: str, *, vocabulary: int) -> list[int]:
    """The token ids of one sequence; errors call it `name`.

    Raises
    ------
    TypeError : something else than integers.
    ValueError : a token id that the model does not know.
    """
    if isinstance(row, np.ndarray | Tensor):
        if row.ndim != 1:
            raise TypeError(f"{name} has shape {list(row.shape)}; expected token ids in one dimension")
        row = row.tolist()
    if isinstance(row, str | bytes | Mapping) or not isinstance(row, Sequence):
        raise TypeError(f"{name} is of type {type(row).__name__}; expected token ids or a text (str)")
    wrong = next((token for token in row if type(token) is not int and not _is_integer(token)), None)
    if wrong is not None or None in row:
        hint = "; apply the tokenizer's chat template to it first" if isinstance(wrong, Mapping) else ""
        raise TypeError(f"{name} holds a {type(wrong).__name__}; expected token ids or a text (str){hint}")
    ids = list(map(operator.index, row))
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        unknown = next(token for token in ids if not 0 <= token < vocabulary)
        raise ValueError(f"{name} has token id {unknown}; the model knows ids from 0 to {vocabulary - 1}")
    return ids


def positive_count(value: object, name: str) -> int:
    """`value` as an integer of at least 1; raises `TypeError` or `ValueError` for anything else."""
    if not _is_integer(value):
        raise TypeError(f"{name} is {value!r}; expected an integer of at least 1")
    count = operator.index(value)  # type: ignore[arg-type]
    if count < 1:
        raise ValueError(f"{name} is {count}; expected at least 1")
    return count


def _rows(prompts: Any) -> tuple[list[Any], bool]:
    """The rows of `prompts`, and whether it is one prompt without a list around it."""
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise TypeError(f"prompts has {sorted(map(str, prompts))}; expected input_ids, as a tokenizer gives them")
        rows, is_one = _rows(prompts["input_ids"])
        if prompts.get("attention_mask") is not None:
            masks, _ = _rows(prompts["attention_mask"])
            rows = [list(compress(row, mask)) for row, mask in zip(rows, masks, strict=True)]
        return rows, is_one
    if isinstance(prompts, np.ndarray | Tensor):
        if prompts.ndim not in (1, 2):
            raise TypeError(f"prompts has shape {list(prompts.shape)}; expected token ids in one or two dimensions")
        prompts = [prompts.tolist()] if prompts.ndim == 1 else prompts.tolist()
        return prompts, len(prompts) == 1
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts is of type {type(prompts).__name__}; expected texts or token ids")
    is_one = len(prompts) > 0 and _is_integer(prompts[0])
    return ([prompts] if is_one else list(prompts)), is_one


def _is_integer(value: object) -> bool:
    """Whether it is an integer of Python, of numpy, or a tensor without dimensions; truth values are none."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 0 and "int" in str(value.dtype)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
