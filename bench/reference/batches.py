"""What the reference model is trained on: generated worlds and natural text, as batches of token ids."""

import math
import random
import re

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import BOS, PAD
from .worlds import ANSWER, FILLER, STATEMENT, WorldSampler

MAX_POSITIONS = 32768
NATURAL = max(ANSWER.values()) + 1  # class of a token beside FILLER, STATEMENT and those of ANSWER


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

    def _world(self, rng: random.Random, tokens: int, alias_share: float) -> tuple[list[int], list[int], list[int]]:
        """(ids, classes, places where a sentence ends and positions may jump)."""
        ids, classes, breaks = [BOS], [FILLER], [1]
        segments = self._worlds.sample(rng, int(tokens * 0.95), alias_share)
        encoded = self._tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False)
        for (text, kind), encoding in zip(segments, encoded, strict=True):
            if kind in (FILLER, STATEMENT) and text[0] != ".":
                breaks.append(len(ids))
            ids.extend(encoding.ids)
            classes.extend([kind] * len(encoding.ids))
        missing = max(0, tokens + 1 - len(ids))
        ids.extend([PAD] * missing)
        classes.extend([-1] * missing)
        return ids[: tokens + 1], classes[: tokens + 1], breaks

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
                breaks = (np.flatnonzero(ids[row] == self._newline) + 1).tolist()
            else:
                ids[row], classes[row], breaks = self._world(rng, tokens, alias_share)
            if rng.random() < jump_share:
                positions[row] += _jumps(rng, breaks, tokens)
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(classes[:, 1:])

    @property
    def _newline(self) -> int:
        return int(self._tokenizer.encode("\n", add_special_tokens=False).ids[0])


def _jumps(rng: random.Random, breaks: list[int], tokens: int) -> np.ndarray:
    """What jumps at half of the sentence ends add to the positions: `[tokens]`.

    Their mean is drawn once for a sequence, so that statements lie at every distance from one another, as between the
    sentences of long documents, though few tokens stand between them.
    """
    skips = np.zeros(tokens, dtype=np.int64)
    mean = math.exp(rng.uniform(math.log(4), math.log(800)))
    for place in breaks:
        if place < tokens and rng.random() < 0.5:
            skips[place] = int(rng.expovariate(1.0 / mean))
    added: np.ndarray = np.minimum(skips.cumsum(), MAX_POSITIONS * 3 // 4 - tokens)
    return added
