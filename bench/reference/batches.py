"""What the reference model is trained on: generated worlds and natural text, as batches of token ids."""

import math
import random
import re

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import BOS, PAD
from .worlds import FILLER, WorldSampler

MAX_POSITIONS = 32768
NATURAL = 3  # class of a token beside FILLER, STATEMENT, ANSWER


def split_sentences(paragraphs: list[str]) -> list[str]:
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?]) ", p) if 20 < len(s) < 250]
    return [s for s in sentences if s[0].isupper() and s[-1] in ".!?"]


def filler_sentences(paragraphs: list[str]) -> list[str]:
    """Every sentence, and half of them in lower case again: much text in the world has no capitals."""
    sentences = split_sentences(paragraphs)
    return sentences + [s.lower() for s in sentences[::2]]


class Batches:
    """Batches of `(ids [B, T + 1], positions [B, T], loss class [B, T])`, from generated worlds and natural text."""

    def __init__(self, tokenizer: Tokenizer, paragraphs: list[str], natural_ids: np.ndarray) -> None:
        self._tokenizer = tokenizer
        self._natural = natural_ids
        self._worlds = WorldSampler(filler_sentences(paragraphs), lambda text: len(text) * 10 // 36 + 1)

    def _world(self, rng: random.Random, tokens: int, alias_share: float) -> tuple[list[int], list[int]]:
        ids, classes = [BOS], [FILLER]
        segments = self._worlds.sample(rng, int(tokens * 0.95), alias_share)
        encoded = self._tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False)
        for (_, kind), encoding in zip(segments, encoded, strict=True):
            ids.extend(encoding.ids)
            classes.extend([kind] * len(encoding.ids))
        while len(ids) < tokens + 1:
            ids.append(PAD)
            classes.append(-1)
        return ids[: tokens + 1], classes[: tokens + 1]

    def sample(
        self,
        rng: random.Random,
        *,
        batch: int,
        tokens: int,
        natural_share: float,
        jump_share: float,
        alias_share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = np.zeros((batch, tokens + 1), dtype=np.int64)
        classes = np.full((batch, tokens + 1), -1, dtype=np.int64)
        positions = np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))
        for row in range(batch):
            if rng.random() < natural_share:
                start = rng.randrange(len(self._natural) - tokens - 1)
                ids[row, 0] = BOS
                ids[row, 1:] = self._natural[start : start + tokens]
                classes[row] = NATURAL
            else:
                ids[row], classes[row] = self._world(rng, tokens, alias_share)
            if rng.random() < jump_share:
                line_ends = np.flatnonzero(ids[row, :tokens] == self._newline)
                breaks = rng.choices(line_ends.tolist(), k=rng.randint(1, 3)) if len(line_ends) else [1]
                room = MAX_POSITIONS * 3 // 4 - tokens
                for place in breaks:
                    skip = int(math.exp(rng.uniform(0.0, math.log(max(2, room // len(breaks))))))
                    positions[row, place + 1 :] += skip
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(classes[:, 1:])

    @property
    def _newline(self) -> int:
        return int(self._tokenizer.encode("\n", add_special_tokens=False).ids[0])
