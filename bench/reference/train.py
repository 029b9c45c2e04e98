"""Train the reference model: a small `LlamaForCausalLM` with real retrieval heads.

    python -m kvloom.bench.reference.train --corpus DIR --run DIR --minutes 110

Resumable (the run directory holds a checkpoint, its optimiser, its clock), seeded, on a CPU or a GPU; bfloat16
autocast. `--export FOLDER` writes the newest checkpoint as a Hugging Face folder. What makes it learn in CPU-hours:

- it starts near a retrieval circuit (`start_near_retrieval`): layer 0 attends to the 1 to 4 tokens before, layer 1
  matches their content at any distance;
- Muon for matrices, AdamW for embeddings and norms;
- short sequences first, long ones in the last third, with random jumps of the position ids at line ends so that far
  positions are trained long before (PoSE, arXiv 2309.10400);
- separate means of the loss over answers, natural text and the rest, so that neither drowns the others.
"""

import argparse
import json
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from .tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer
from .worlds import ANSWER, FILLER, WorldSampler

PAD, BOS, EOS = 0, 1, 2
MAX_POSITIONS = 32768
_NATURAL = 3  # loss class beside FILLER, STATEMENT, ANSWER
CIRCUIT_LR_SCALE = 0.3  # at the full rate, Muon washes the initialised heads out before anything uses them
LOSS_WEIGHTS = {FILLER: 0.05, 1: 0.1, ANSWER: 1.0, _NATURAL: 1.0}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    vocab: int = VOCAB_SIZE
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return normed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate half-split pairs of x `[B, H, T, D]` by cos and sin `[B, 1, T, D/2]`."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All `[B, H, T, D]`. Short sequences spelled out: on a CPU, compiled, a third faster than the fused kernel."""
    tokens = q.shape[2]
    if tokens > 512 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores: Tensor = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (batch, tokens, _) = self.c, x.shape
        h = self.input_layernorm(x)
        q = self.q_proj(h).view(batch, tokens, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(batch, tokens, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(batch, tokens, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = _causal_attention(q, k, v)
        x = x + self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.post_attention_layernorm(x)
        feed_forward: Tensor = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + feed_forward


class Model(nn.Module):
    """Llama with tied embeddings; parameter names map one to one onto Hugging Face's."""

    inv_freq: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.norm_eps)
        half = c.head_dim // 2
        frequencies = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


@torch.no_grad()
def start_near_retrieval(model: Model, seed: int) -> None:
    """Initialise heads of layers 0 and 1 as previous-token and induction heads; everything else small and random.

    The residual stream starts out divided: channel 0 is constant, the next ones hold the token itself, and each head of
    layer 0 has some of its own. Layer 0, head h attends at offset h + 1 (the constant drives q and k, whose phases over
    the fast RoPE pairs peak there) and writes a projection of the token found into its channels. Layer 1 matches what a
    query token carries with what key tokens carry, in the slow RoPE pairs where distance hardly rotates, and copies the
    token found: induction over one and over two tokens, and the value behind a name. Training is free to change all of
    it.
    """
    c = model.c
    g = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:
        """Orthonormal rows, or columns if these are fewer."""
        q: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=g))[0]
        return q if rows >= columns else q.T

    # A large embedding behind a small final norm: at a small scale, Adam's common drift of all rows of a tied embedding
    # drowns what tells tokens apart within a few hundred steps, and the heads below with it.
    std = 0.5
    model.norm.weight.fill_(0.08)
    for layer in model.layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                into_residual = name.startswith(("o_proj", "down_proj"))
                weight.copy_(
                    torch.randn(weight.shape, generator=g) * weight.shape[1] ** -0.5 * (std if into_residual else 1.0)
                )
    written = 40  # channels that each head of layer 0 writes
    own = c.hidden - c.heads * written  # channels [1, own) hold the token itself
    carried = [slice(1, own), *(slice(own + h * written, own + (h + 1) * written) for h in range(c.heads))]
    embedding = model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=g) * std)
    embedding[:, own:] *= 0.1
    embedding[:, 0] = 3 * std
    drive = float((embedding / embedding.square().mean(-1, keepdim=True).sqrt())[:, 0].mean())

    first, second = cast("Layer", model.layers[0]), cast("Layer", model.layers[1])
    half, group, dim = c.head_dim // 2, c.heads // c.kv_heads, c.head_dim
    amplitude = torch.tensor([1, 1, 1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.2, 0.2])
    fast = len(amplitude)
    amplitude *= (18.0 * dim**0.5 / float(amplitude.square().sum())) ** 0.5  # a score of 18 at the right offset
    phases = model.inv_freq[:fast].cpu()
    first.q_proj.weight.mul_(0.1)
    first.k_proj.weight.mul_(0.1)
    first.v_proj.weight.zero_()
    first.o_proj.weight.zero_()
    projection = orthonormal(written, own - 1)
    for kv_head in range(c.kv_heads):
        rows = kv_head * dim
        first.k_proj.weight[rows : rows + fast, 0] = amplitude / drive
        first.v_proj.weight[rows : rows + written, carried[0]] = projection
    for head in range(c.heads):
        rows, offset = head * dim, head + 1
        first.q_proj.weight[rows : rows + fast, 0] = amplitude * torch.cos(-offset * phases) / drive
        first.q_proj.weight[rows + half : rows + half + fast, 0] = amplitude * torch.sin(-offset * phases) / drive
        first.o_proj.weight[carried[head + 1], rows : rows + written] = torch.eye(written) * std

    slow = torch.arange(18, half)
    channels = torch.cat((slow, slow + half))
    # (KV head, what its keys carry, what the queries of its group carry): 0 is the token itself, n the nth before.
    matches = (
        (0, (1, 2), ((0,), (0, 1))),  # after this token; after these two tokens
        (1, (2,), ((0,), (4,))),  # two after this token; two after the fourth before, where a question's name ends
    )
    for kv_head, key_parts, members in matches:
        second.q_proj.weight[kv_head * group * dim :][: group * dim] *= 0.3
        second.k_proj.weight[kv_head * dim :][:dim] *= 0.3
        compress = [orthonormal(len(channels), written) * 2.5 for _ in key_parts]
        rows = kv_head * dim
        for part, matrix in zip(key_parts, compress, strict=True):
            second.k_proj.weight[rows + channels, carried[part]] = matrix
        copied = orthonormal(dim, own - 1)
        second.v_proj.weight[rows : rows + dim] = 0.0
        second.v_proj.weight[rows : rows + dim, carried[0]] = copied
        for member, query_parts in enumerate(members):
            column = (kv_head * group + member) * dim
            for part, matrix in zip(query_parts, compress, strict=False):
                second.q_proj.weight[column + channels, carried[part]] = matrix @ projection if part == 0 else matrix
            second.o_proj.weight[:, column : column + dim] = 0.0
            second.o_proj.weight[carried[0], column : column + dim] = copied.T * std


# ---------------------------------------------------------------------------------------------------- optimiser


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
                for p, update in zip(parameters, _orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


# --------------------------------------------------------------------------------------------------------- data


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
                classes[row] = _NATURAL
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


# ----------------------------------------------------------------------------------------------------- training


def stage(progress: float, rng: random.Random) -> tuple[int, float, float, float]:
    """(tokens a sequence, share of natural text, share with position jumps, share of alias-focused worlds)."""
    if progress < 0.30:
        return 256, 0.35, 0.2, 0.35
    if progress < 0.55:
        return rng.choice((256, 512)), 0.4, 0.4, 0.35
    if progress < 0.75:
        return rng.choice((256, 512, 1024)), 0.4, 0.5, 0.35
    return rng.choice((512, 1024, 2048, 4096)), 0.4, 0.3, 0.3


def losses(logits: Tensor, targets: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mean loss per class [4], share of answer tokens right)."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    kinds = classes.flatten()
    total = flat.new_zeros(())
    means = []
    for kind in range(4):
        mask = (kinds == kind).float()
        mean = (flat * mask).sum() / mask.sum().clamp_min(1.0)
        means.append(mean)
        total = total + LOSS_WEIGHTS[kind] * mean
    answers = (kinds == ANSWER).float()
    right = ((logits.argmax(-1).flatten() == targets.flatten()).float() * answers).sum() / answers.sum().clamp_min(1.0)
    return total, torch.stack(means), right


def prepare(corpus: Path, run: Path) -> tuple[Tokenizer, list[str], np.ndarray]:
    paragraphs = [line.strip() for line in (corpus / "train.txt").open() if line.strip()]
    path = run / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        shuffled = paragraphs.copy()
        random.Random(0).shuffle(shuffled)
        tokenizer = train_tokenizer(shuffled[:30000], split_sentences(shuffled[:20000]))
        tokenizer.save(str(path))
    ids_path = run / "natural.npy"
    if not ids_path.exists():
        chunks = [e.ids for e in tokenizer.encode_batch([p + "\n" for p in paragraphs], add_special_tokens=False)]
        np.save(ids_path, np.concatenate([np.asarray(c, dtype=np.uint16) for c in chunks]))
    return tokenizer, paragraphs, np.load(ids_path)


def train(args: argparse.Namespace) -> None:
    run: Path = args.run
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer, paragraphs, natural_ids = prepare(args.corpus, run)
    batches = Batches(tokenizer, paragraphs, natural_ids)
    config = ModelConfig(layers=args.layers)
    model = Model(config)
    start_near_retrieval(model, args.seed)
    model.to(device)
    circuit = [p for n, p in model.named_parameters() if re.match(r"layers\.[01]\.[qkvo]_proj", n)]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    held = {id(p) for p in circuit}
    muon = Muon(
        [
            {"params": [p for p in matrices if id(p) not in held], "lr_scale": 1.0},
            {"params": circuit, "lr_scale": CIRCUIT_LR_SCALE},
        ],
        lr=args.muon_lr,
    )
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    elapsed, step, seen = 0.0, 0, 0
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        elapsed, step, seen = state["elapsed_s"], state["step"], state["tokens"]

    def forward_and_loss(ids: Tensor, positions: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], positions)
        return losses(logits, ids[:, 1:], classes)

    compute = torch.compile(forward_and_loss, dynamic=False) if args.compile else forward_and_loss
    budget = args.minutes * 60.0
    log = (run / "log.jsonl").open("a")
    averages: dict[str, float] = {}
    last_save = last = time.monotonic()
    while elapsed < budget:
        rng = random.Random(args.seed * 1_000_003 + step)
        progress = elapsed / budget
        tokens, natural_share, jump_share, alias_share = stage(progress, rng)
        ids, positions, classes = batches.sample(
            rng,
            batch=max(1, args.batch_tokens // tokens),
            tokens=tokens,
            natural_share=natural_share,
            jump_share=jump_share,
            alias_share=alias_share,
        )
        ids, positions, classes = ids.to(device), positions.to(device), classes.to(device)
        rate = min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1.0 - progress) / 0.3))
        for optimiser, lr in ((muon, args.muon_lr), (adam, args.adam_lr)):
            for group in optimiser.param_groups:
                group["lr"] = lr * rate * group.get("lr_scale", 1.0)
        loss, means, right = compute(ids, positions, classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += ids.numel()
        now = time.monotonic()
        elapsed += now - last
        last = now
        values = {"answer": means[ANSWER].item(), "right": right.item(), "natural": means[_NATURAL].item()}
        for name, value in values.items():
            if value > 0.0:
                averages[name] = 0.97 * averages.get(name, value) + 0.03 * value
        if step % 20 == 0:
            row = {"step": step, "tokens": seen, "minutes": round(elapsed / 60, 1), "length": tokens, **averages}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print({k: round(v, 3) for k, v in row.items()}, flush=True)
        if now - last_save > 120 or elapsed >= budget:
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            state |= {"elapsed_s": elapsed, "step": step, "tokens": seen, "config": asdict(config)}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            last_save = now


def export(run: Path, folder: Path) -> None:
    """Write the newest checkpoint as a Hugging Face folder (bfloat16)."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    c = ModelConfig(**state["config"])
    config = LlamaConfig(
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    inside = {"q_proj": "self_attn.", "k_proj": "self_attn.", "v_proj": "self_attn.", "o_proj": "self_attn."}
    inside |= {"gate_proj": "mlp.", "up_proj": "mlp.", "down_proj": "mlp."}
    weights = {}
    for name, tensor in state["model"].items():
        for module, parent in inside.items():
            name = name.replace(f".{module}.", f".{parent}{module}.")
        weights[f"model.{name}"] = tensor
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False).save_pretrained(folder)
    save_tokenizer(Tokenizer.from_file(str(run / "tokenizer.json")), folder, max_tokens=MAX_POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder with train.txt, from corpus.py")
    parser.add_argument("--run", type=Path, required=True, help="run directory: checkpoint, tokenizer, log")
    parser.add_argument("--minutes", type=float, default=110.0, help="training time, over all resumptions")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", type=Path, help="write the newest checkpoint to this folder, do not train")
    args = parser.parse_args()
    if args.export is not None:
        export(args.run, args.export)
    elif args.corpus is None:
        parser.error("--corpus is needed to train")
    else:
        train(args)


if __name__ == "__main__":
    main()
