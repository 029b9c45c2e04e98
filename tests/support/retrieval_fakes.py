"""Selectors for tests, small enough to be believed: one that travels with chunks, one that learns from queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvloom.calibration.model_profile import Profile
from kvloom.core import KVSpec
from kvloom.errors import CodecError
from kvloom.retrieval.exact import ExactSelector
from kvloom.retrieval.selector import LayerShape, Pooling, Selection, Selector, top_ids


class MeansSelector:
    """Tokens by the mean key of the 8 that they stand among; travels with chunks. `restored` counts tokens read."""

    name = "means"

    def __init__(self, shape: LayerShape, *, start: int = 0) -> None:
        self.shape, self.start, self.restored = shape, start, 0
        self._keys = torch.empty(shape.kv_heads, 0, shape.head_dim)
        self._means = torch.empty(shape.kv_heads, 0, shape.head_dim)

    def __len__(self) -> int:
        return 8 * self._means.shape[1]

    @property
    def held_bytes(self) -> int:
        return self._means.nbytes

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        means = keys.float().unflatten(1, (-1, 8)).mean(2)
        self._means = torch.cat((self._means, means), 1)

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        scores = queries.float().view(self.shape.kv_heads, self.shape.group, -1).sum(1, keepdim=True) @ self._means.mT
        return Selection(top_ids(scores[:, 0].repeat_interleave(8, 1), budget, self.start), self._means.nbytes)

    def export(self, first: int, stop: int) -> Mapping[str, Tensor]:
        return {"means": self._means[:, (first - self.start) // 8 : (stop - self.start) // 8].clone()}

    def restore(self, parts: Mapping[str, Tensor], tokens: int) -> None:
        means = parts.get("means")
        if means is None or means.shape != (self.shape.kv_heads, tokens // 8, self.shape.head_dim):
            raise CodecError("these are not means of so many tokens")
        self._means = torch.cat((self._means, means), 1)
        self.restored += tokens


class StatefulSelector(ExactSelector):
    """Exact, and stored with its sequence as a whole; `restored` tokens."""

    name = "stateful"
    is_spoiled = False
    restored = 0

    def state(self) -> Mapping[str, Tensor]:
        return {"keys": self._keys.all.clone()}

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        if self.is_spoiled or not torch.equal(parts["keys"], self.state()["keys"]):
            raise CodecError("this is another graph's")
        self.restored = len(self)


class LearningSelector(ExactSelector):
    """Exact among the tokens built in, blind for others until `build`; `seen` are the positions of queries."""

    name = "learning"

    def __init__(self, shape: LayerShape, *, start: int = 0) -> None:
        super().__init__(shape, start=start)
        self.seen: list[int] = []
        self.built = 0

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        if queries.shape != (self.shape.query_heads, len(positions), self.shape.head_dim):
            raise ValueError(f"queries are {list(queries.shape)} for {len(positions)} positions")
        self.seen += positions.tolist()

    def build(self) -> None:
        self.built = len(self)


def make_codebooks(spec: KVSpec, centroids: int = 32) -> Profile:
    """Random ones, in a metric of none."""
    random = torch.Generator().manual_seed(0)
    shape = (spec.num_layers, spec.num_kv_heads)
    tensors = {
        "vq.centroids": torch.randn(*shape, centroids, spec.head_dim, generator=random).half(),
        "vq.factor": torch.eye(spec.head_dim).expand(*shape, -1, -1).contiguous(),
        "vq.bands": torch.tensor([[1, 64], [64, 512], [512, 4096]]).expand(spec.num_layers, -1, -1).contiguous(),
    }
    return Profile(spec, tensors, {})


FAKES = {"means": MeansSelector, "stateful": StatefulSelector, "learning": LearningSelector}


def maker(name: str) -> Callable[..., Selector]:
    """For the table of `retrieval.catalog`."""

    def make(shape: LayerShape, _layer: int, *, start: int, pooling: Pooling, profile: object) -> Selector:
        return FAKES[name](shape, start=start)

    return make
