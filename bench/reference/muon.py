"""Muon: momentum whose update is made orthogonal, for matrices (Jordan et al. 2024)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _orthogonalise(matrix: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps towards the nearest semi-orthogonal matrix (Muon, Jordan et al. 2024)."""
    x: Tensor = matrix.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if transposed else x).float()


def _orthogonalise_shared(stack: Tensor) -> Tensor:
    """Orthogonalise every matrix of a stack `[n, rows, columns]`, a share of them in each process."""
    if not dist.is_initialized():
        return _orthogonalise(stack)
    processes = dist.get_world_size()
    padded = torch.cat((stack, stack.new_zeros(-len(stack) % processes, *stack.shape[1:])))
    own = _orthogonalise(padded.chunk(processes)[dist.get_rank()])
    parts = [torch.empty_like(own) for _ in range(processes)]
    dist.all_gather(parts, own)
    return torch.cat(parts)[: len(stack)]


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, then the orthogonalised update; matrices of one shape are stepped as one batch."""

    def __init__(self, parameters: list[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - named by Optimizer
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    if p.grad is None:
                        raise ValueError(
                            f"a matrix of shape {list(shape)} has no gradient; expected one for every matrix"
                        )
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, _orthogonalise_shared(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
