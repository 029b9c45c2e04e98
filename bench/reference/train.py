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
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .batches import MAX_POSITIONS, NATURAL, Batches, split_sentences
from .muon import Muon
from .network import Model, ModelConfig, start_near_retrieval
from .tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer
from .worlds import ANSWER, FILLER, STATEMENT

FILLER_WEIGHT, STATEMENT_WEIGHT = 0.05, 0.1  # of their loss, beside 1 for answers
WARM_UP_STEPS = 600


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained on at some time.

    Attributes
    ----------
    lengths : tokens of a sequence, one of these for each batch.
    natural_share : share of natural text among the sequences.
    natural_weight : of its loss, beside 1 for answers. While binding is learned, natural text at full weight drowns it.
    jump_share : share of sequences with jumps of the positions.
    alias_share : share of worlds that are mostly aliases.
    """

    lengths: tuple[int, ...]
    natural_share: float
    natural_weight: float
    jump_share: float
    alias_share: float


def stage(progress: float) -> Stage:
    """The curriculum: binding first, then language, then length."""
    if progress < 0.40:
        return Stage((256,), 0.2, 0.2, 0.2, 0.15)
    if progress < 0.78:
        return Stage((256, 512, 1024), 0.35, 0.35, 0.4, 0.3)
    return Stage((512, 1024, 2048, 4608), 0.4, 0.6, 0.3, 0.3)


def circuit_lr_ratio(progress: float) -> float:
    """Share of Muon's rate for the initialised heads: at the full one it washes them out before anything uses them."""
    return 0.1 if progress < 0.15 else 0.3


def class_losses(logits: Tensor, targets: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss of each class `[4]`, share of answer tokens right)."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    masks = torch.stack([(classes.flatten() == kind).float() for kind in range(4)])
    means = (masks * flat).sum(1) / masks.sum(1).clamp_min(1.0)
    hits = (logits.argmax(-1).flatten() == targets.flatten()).float() * masks[ANSWER]
    return means, hits.sum() / masks[ANSWER].sum().clamp_min(1.0)


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
    named = dict(model.named_parameters())
    circuit = [n for n in named if re.match(r"layers\.[01]\.[qkvo]_proj", n)]
    matrices = [n for n, p in named.items() if p.ndim == 2 and "embed" not in n and n not in circuit]
    others = [p for n, p in named.items() if p.ndim == 1 or "embed" in n]
    muon = Muon([{"params": [named[n] for n in group]} for group in (matrices, circuit)], lr=args.muon_lr)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    elapsed, step, seen = 0.0, 0, 0
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        elapsed, step, seen = state["elapsed_s"], state["step"], state["tokens"]

    def forward(ids: Tensor, positions: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], positions)
        return class_losses(logits, ids[:, 1:], classes)

    compute = torch.compile(forward, dynamic=False) if args.compile else forward
    budget = args.minutes * 60.0
    log = (run / "log.jsonl").open("a")
    averages: dict[str, float] = {}
    last_save = last = time.monotonic()
    while elapsed < budget:
        rng = random.Random(args.seed * 1_000_003 + step)
        progress = elapsed / budget
        now_at = stage(progress)
        tokens = rng.choice(now_at.lengths)
        ids, positions, classes = batches.sample(
            rng,
            batch=max(1, args.batch_tokens // tokens),
            tokens=tokens,
            natural_share=now_at.natural_share,
            jump_share=now_at.jump_share,
            alias_share=now_at.alias_share,
        )
        ids, positions, classes = ids.to(device), positions.to(device), classes.to(device)
        rate = min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.02, (1.0 - progress) / 0.3))
        for group, lr in zip(
            (*muon.param_groups, *adam.param_groups),
            (args.muon_lr, args.muon_lr * circuit_lr_ratio(progress), args.adam_lr),
            strict=True,
        ):
            group["lr"] = lr * rate
        means, right = compute(ids, positions, classes)
        weights = {FILLER: FILLER_WEIGHT, STATEMENT: STATEMENT_WEIGHT, ANSWER: 1.0, NATURAL: now_at.natural_weight}
        sum((means[kind] * weight for kind, weight in weights.items()), means.new_zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += ids.numel()
        now = time.monotonic()
        elapsed += now - last
        last = now
        values = {"answer": means[ANSWER].item(), "right": right.item(), "natural": means[NATURAL].item()}
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
    parser.add_argument("--minutes", type=float, default=108.0, help="training time, over all resumptions")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
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
