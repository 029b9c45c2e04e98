"""Train the reference model: a small `LlamaForCausalLM` with real retrieval heads.

    python -m kvloom.bench.reference.train --corpus DIR --run DIR

Resumable (the run directory holds a checkpoint, its optimiser, its clock), seeded, on a GPU or on CPU cores, one
process each; bfloat16 autocast. `--export FOLDER` writes the newest checkpoint as a Hugging
Face folder. What makes it learn in CPU-hours:

- it starts near a retrieval circuit (`start_near_retrieval`): layer 0 attends a few tokens back and to the
  last name, layers 1 and 2 match content at any distance;
- Muon for matrices, AdamW for embeddings and norms;
- short sequences first, long ones last, with random jumps of the position ids at sentence ends so that far positions
  are trained long before (PoSE, arXiv 2309.10400);
- separate means of the loss over answers, natural text and the rest, so that neither drowns the others.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ...evaluation.statements import name_ends, value_beginnings
from .batches import MAX_POSITIONS, NATURAL, Batches, split_sentences
from .muon import Muon
from .network import CIRCUIT, Model, ModelConfig, start_near_retrieval
from .tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer
from .worlds import ANSWER, FILLER, STATEMENT

FILLER_WEIGHT, STATEMENT_WEIGHT = 0.05, 0.1  # of their loss, beside 1 for answers
WARM_UP_STEPS = 300
CIRCUIT_LR_RATIO = 0.3  # of Muon's rate, for the initialised heads: the full one washes them out before they are used


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
    if progress < 0.35:
        return Stage((256,), 0.2, 0.3, 0.5, 0.25)
    if progress < 0.65:
        return Stage((256, 512, 1024), 0.45, 0.8, 0.5, 0.25)
    return Stage((512, 1024, 2048, 4608), 0.5, 1.0, 0.3, 0.25)


def class_losses(logits: Tensor, targets: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss of filler, statements, answers, natural text `[4]`; right tokens and tokens by class `[9]` each)."""
    classes = classes.flatten()
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    is_answer = (classes >= min(ANSWER.values())) & (classes <= max(ANSWER.values()))
    masks = torch.stack([classes == FILLER, classes == STATEMENT, is_answer, classes == NATURAL]).float()
    means = (masks * flat).sum(1) / masks.sum(1).clamp_min(1.0)
    by_class = torch.stack([classes == kind for kind in range(NATURAL + 1)])
    hits = (logits.argmax(-1).flatten() == targets.flatten()) & by_class
    return means, hits.sum(1), by_class.sum(1)


def mean_over_processes(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


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


def train(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One of `args.processes` processes that train the same model on different batches."""
    run: Path = args.run
    processes: int = args.processes
    if processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if rank > 0:
        dist.barrier()  # the first process makes the files, the others read them
    tokenizer, paragraphs, natural_ids = prepare(args.corpus, run)
    if rank == 0 and processes > 1:
        dist.barrier()
    batches = Batches(tokenizer, paragraphs, natural_ids)
    config = ModelConfig(layers=args.layers)
    model = Model(config)
    names, beginnings = (
        [tokenizer.encode(f" {word}", add_special_tokens=False).ids[0] for word in words]
        for words in (name_ends(), value_beginnings())
    )
    is_ = tokenizer.encode(" is", add_special_tokens=False).ids[0]
    start_near_retrieval(model, args.seed, names=names, values=beginnings, is_=is_)
    model.to(device)
    named = dict(model.named_parameters())
    circuit = [n for n in named if re.match(CIRCUIT, n)]
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

    def forward(ids: Tensor, positions: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], positions)
        return class_losses(logits, ids[:, 1:], classes)

    compute = torch.compile(forward, dynamic=False) if args.compile else forward
    budget = args.minutes * 60.0
    log = (run / "log.jsonl").open("a")
    averages: dict[str, float] = {}
    last_save = last = time.monotonic()
    while elapsed < budget:
        progress = elapsed / budget
        now_at = stage(progress)
        tokens = random.Random(f"{args.seed} {step}").choice(now_at.lengths)
        ids, positions, classes = batches.sample(
            random.Random(f"{args.seed} {step} {rank}"),
            batch=max(1, args.batch_tokens // processes // tokens),
            tokens=tokens,
            natural_share=now_at.natural_share,
            jump_share=now_at.jump_share,
            alias_share=now_at.alias_share,
        )
        ids, positions, classes = ids.to(device), positions.to(device), classes.to(device)
        rate = min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.02, (1.0 - progress) / 0.3))
        for group, lr in zip(
            (*muon.param_groups, *adam.param_groups),
            (args.muon_lr, args.muon_lr * CIRCUIT_LR_RATIO, args.adam_lr),
            strict=True,
        ):
            group["lr"] = lr * rate
        means, hits, totals = compute(ids, positions, classes)
        weights = means.new_tensor((FILLER_WEIGHT, STATEMENT_WEIGHT, 1.0, now_at.natural_weight))
        (means * weights).sum().backward()
        if processes > 1:
            mean_over_processes(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seen += ids.numel() * processes
        now = time.monotonic()
        clock = torch.tensor(now - last)
        last = now
        if processes > 1:
            dist.broadcast(clock, 0)  # all must see the same progress
        elapsed += clock.item()
        values = {kind: (hits[i] / totals[i]).item() for kind, i in ANSWER.items() if totals[i]}
        if totals[NATURAL]:
            values["natural"] = means[3].item()
        for name, value in values.items():
            averages[name] = 0.97 * averages.get(name, value) + 0.03 * value
        if rank > 0:
            continue
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


def launch(args: argparse.Namespace) -> None:
    """Train in as many processes as wanted, until all are done."""
    args.run.mkdir(parents=True, exist_ok=True)
    if args.processes == 1:
        train(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, args=(args, f"file://{folder}/rendezvous"), nprocs=args.processes)


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
    parser.add_argument("--minutes", type=float, default=148.0, help="training time, over all resumptions")
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.003)
    parser.add_argument("--adam-lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", type=Path, help="write the newest checkpoint to this folder, do not train")
    args = parser.parse_args()
    if args.export is not None:
        export(args.run, args.export)
    elif args.corpus is None:
        parser.error("--corpus is needed to train")
    elif args.layers < 4:
        parser.error(f"--layers is {args.layers}; the circuit that training starts from takes at least 4")
    else:
        launch(args)


if __name__ == "__main__":
    main()
