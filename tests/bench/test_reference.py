"""The reference model's tools, on models and texts made here: evaluation, 5-gram, outliers, training, card."""

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvloom.bench.codecs.outliers import export_stressed, inject_outliers, outlier_factors
from kvloom.bench.reference import evaluate, network, train
from kvloom.bench.reference.model_card import model_card
from kvloom.bench.reference.muon import Muon
from kvloom.bench.reference.ngram import NgramModel
from kvloom.bench.reference.tokenizer import save_tokenizer, train_tokenizer
from kvloom.evaluation import statements

SUBJECTS = ("The server", "A package", "This option", "Every user", "The old index", "One process")
VERBS = ("reads", "writes", "checks", "replaces", "describes", "removes")
OBJECTS = ("the file", "a long table", "its own copy", "the last record", "another folder", "what was stored")
PARAGRAPHS = [f"{s} {v} {o} before it goes on." for s, v, o in itertools.product(SUBJECTS, VERBS, OBJECTS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(PARAGRAPHS, PARAGRAPHS)


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(tokenizer.get_vocab_size()).save_pretrained(path)
    save_tokenizer(tokenizer, path, max_tokens=4096)
    return path


# --------------------------------------------------------------------------------------------------- evaluation


def test_one_forward_decides_what_generate_would_say(folder: Path) -> None:
    model, _ = evaluate.load(folder)
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 500) for _ in range(length))] for length in (5, 40, 17, 23)]
    greedy = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        greedy.append(out[0, len(prompt) :].tolist())
    assert evaluate.answered(model, list(zip(prompts, greedy, strict=True))) == [True] * 4
    for place in range(4):
        wrong = [[(t + 1) % 500 if i == place else t for i, t in enumerate(answer)] for answer in greedy]
        assert evaluate.answered(model, list(zip(prompts, wrong, strict=True))) == [False] * 4


def test_prompts_start_with_bos_and_fill_their_context(folder: Path) -> None:
    _, tokenizer = evaluate.load(folder)
    for kind in ("needle", "record"):
        tasks = evaluate.sample_tasks(tokenizer, PARAGRAPHS, kind, trials=5, context_tokens=512, seed=0)
        for task in tasks:
            prompt, answer = evaluate.encode_task(tokenizer, task)
            assert prompt[0] == tokenizer.bos_token_id
            assert 350 < len(prompt) + len(answer) <= 512
            assert tokenizer.decode(prompt[1:]) == "".join(task.documents) + task.question
            assert tokenizer.decode(answer) == f" {task.answer}."


def test_language_losses_are_the_models_own(folder: Path) -> None:
    model, tokenizer = evaluate.load(folder)
    rows = evaluate.windows(tokenizer, PARAGRAPHS)
    assert rows.shape[1] == evaluate.WINDOW_TOKENS - 1
    ids = torch.cat((torch.ones(1, 1, dtype=torch.int64), torch.from_numpy(rows[:1])), 1)
    with torch.inference_mode():
        expected = model(ids, labels=ids).loss.item()
    assert evaluate.language_losses(model, rows[:1])[0] == pytest.approx(expected, rel=1e-5)


def test_sinks_are_seen_where_a_head_looks_at_bos(folder: Path) -> None:
    model, _ = evaluate.load(folder)
    rows = np.random.default_rng(0).integers(3, 500, (1, 200))
    assert evaluate.sink_ratios(model, rows).max() < 0.5
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[1, 0] = 100.0
        attention, slow = model.model.layers[1].self_attn, 15  # the pair that hardly rotates
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        attention.q_proj.weight[slow] = 0.0
        attention.k_proj.weight[slow] = 0.0
        attention.q_proj.weight[slow, 0] = 50.0
        attention.k_proj.weight[slow, 0] = 50.0
    shares = evaluate.sink_ratios(model, rows)
    assert shares.shape == (2, 4)
    assert shares[1, 0] > 0.9
    assert shares[0].max() < 0.5


@pytest.mark.slow
def test_the_whole_evaluation_and_its_card(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(PARAGRAPHS))
    result = evaluate.evaluate(folder, trials=2, context=512, corpus=tmp_path)
    document = json.loads(result.to_json())
    metrics = document["metrics"]
    assert document["bench"] == "reference"
    assert {f"{kind}_at_512" for kind in ("needle", "needle8", "record", "alias")} < set(metrics)
    assert metrics["needle_at_512"]["value"] == 0.0  # a random model
    loss, gain = metrics["heldout_loss"], metrics["heldout_loss_gain"]
    assert gain["value"] == pytest.approx(loss["baseline"] - loss["value"])
    assert metrics["heldout_perplexity"]["value"] == pytest.approx(np.exp(loss["value"]))
    sinks = [row["value"] for row in document["rows"] if row["measure"] == "sink"]
    assert len(sinks) == 8
    assert metrics["sink_ratio"]["value"] == pytest.approx(max(sinks))

    log = [{"step": 20, "tokens": 999, "minutes": 1.0, "length": n} for n in (256, 128)]
    card = model_card(json.loads((folder / "config.json").read_text()), document, log)
    for figure in (
        f"{loss['value']:.3f} ({loss['low']:.3f} to {loss['high']:.3f}) nats a token",
        f"reaches {loss['baseline']:.3f} nats on the same tokens",
        "| 0.000 (0.000 to 0.658) |",
        "20 steps, 999 tokens",
        "sequences of up to 256 tokens",
        "4 query and 2 KV heads of 32",
    ):
        assert figure in card


# ------------------------------------------------------------------------------------------------------- 5-gram


@pytest.mark.parametrize("length", [12, 3000])
def test_ngram_probabilities_sum_to_one(length: int) -> None:
    vocab_size, rng = 7, np.random.default_rng(1)
    text = rng.choice(vocab_size - 1, length, p=[0.4, 0.3, 0.15, 0.1, 0.04, 0.01])  # the last token is never seen
    model = NgramModel(text, vocab_size=vocab_size, order=4)
    for context in ([], [0], [0, 1, 0], [6, 6, 6], [5, 0, 1, 0, 0], text[:3].tolist()):
        continued = [np.array([*context, token]) for token in range(vocab_size)]
        probabilities = np.exp([model.log_probabilities(ids)[-1] for ids in continued])
        assert probabilities.min() > 0.0
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_ngram_matches_kneser_ney_by_hand() -> None:
    # a b a b a c: bigrams ab 2, ba 2, ac 1. Too short for estimated discounts: every count loses 0.5.
    a, b, c = 0, 1, 2
    model = NgramModel(np.array([a, b, a, b, a, c]), vocab_size=3, order=2)
    # Unigrams count distinct predecessors: a 1 (b), b 1 (a), c 1 (a); each (1 - 0.5) / 3 + (1.5 / 3) / 3 = 1 / 3.
    ab = (2 - 0.5) / 3 + (1.0 / 3) * (1 / 3)
    ac = (1 - 0.5) / 3 + (1.0 / 3) * (1 / 3)
    cb = 1 / 3  # c was never followed by anything
    found = model.log_probabilities(np.array([a, b, a, c, b]))
    assert np.exp(found[[0, 1, 3, 4]]) == pytest.approx([1 / 3, ab, ac, cb])


def test_longer_ngrams_predict_better() -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 3, 20_000).cumsum() * 7 % 50  # each token narrows the next down to two
    train_ids, test_ids = steps[:16_000], steps[16_000:]
    losses = [-NgramModel(train_ids, vocab_size=50, order=n).log_probabilities(test_ids).mean() for n in (1, 2, 5)]
    assert losses[0] == pytest.approx(np.log(50), abs=0.05)
    assert losses[1] == pytest.approx(np.log(2), abs=0.05)
    assert losses[2] < losses[1] + 0.05


def test_ngram_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="order is 6 with 2560 tokens"):
        NgramModel(np.zeros(9, dtype=np.int64), vocab_size=2560, order=6)
    with pytest.raises(ValueError, match="each from 0 to 2"):
        NgramModel(np.array([0, 1, 3]), vocab_size=3, order=2)


# ----------------------------------------------------------------------------------------------------- outliers


def cached(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, keys and values `[L, H, T, D]` of one sequence."""
    with torch.inference_mode():
        out = model(ids, use_cache=True)
    layers = out.past_key_values.layers
    return out.logits, torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


def peak_to_median(states: Tensor) -> float:
    """Largest mean magnitude of a channel over the median, in the worst KV head of `[L, H, T, D]`."""
    magnitudes = states.float().abs().mean(2)
    return float((magnitudes.amax(-1) / magnitudes.median(-1).values).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_change_the_cache_and_not_the_function(dtype: torch.dtype) -> None:
    model = tiny_llama(500).to(dtype)
    ids = torch.randint(3, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    before = cached(model, ids)
    after = cached(inject_outliers(model, seed=1), ids)
    assert torch.equal(before[0], after[0])
    for plain, stressed in zip(before[1:], after[1:], strict=True):
        assert peak_to_median(stressed) >= 10.0 * peak_to_median(plain)


def test_outlier_factors_are_powers_of_two_within_range() -> None:
    factors = outlier_factors(1000, outlier_ratio=0.1, generator=torch.Generator().manual_seed(0))
    raised = factors[factors > 1]
    assert len(raised) == 100
    assert set(raised.tolist()) == {8.0, 16.0, 32.0}
    assert outlier_factors(4, outlier_ratio=0.01, generator=torch.Generator()).gt(1).sum() == 1
    with pytest.raises(ValueError, match="outlier_ratio is 0"):
        inject_outliers(tiny_llama(10), outlier_ratio=0)


def test_stressed_export_is_a_whole_model_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "stressed"
    export_stressed(folder, target, seed=3)
    plain, stressed = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, target))
    ids = torch.randint(3, 500, (1, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(cached(plain, ids)[0], cached(stressed, ids)[0])
    assert not torch.equal(cached(plain, ids)[1], cached(stressed, ids)[1])
    assert PreTrainedTokenizerFast.from_pretrained(target).bos_token_id == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stressed"]
    with pytest.raises(FileExistsError):
        export_stressed(folder, target)


# ----------------------------------------------------------------------------------------------------- training


def test_a_model_starts_with_retrieval_and_binding() -> None:
    """Untrained, the answer mostly has the largest logit among the values stated; by chance that were 13 of 40."""
    words = [*statements.name_ends(), *statements.value_beginnings(), "is"]
    token = {word: 10 + i for i, word in enumerate(words)}
    others = ["Now", "consider", ".", "Its", "code", "The", "of", "What", "?", "Q", ":", "A", "\n"]
    token |= {word: 10 + len(words) + i for i, word in enumerate(others)}
    model = network.Model(network.ModelConfig())
    names, values = ([token[word] for word in f()] for f in (statements.name_ends, statements.value_beginnings))
    network.start_near_retrieval(model, 0, names=names, values=values, is_=token["is"])
    rng, right = random.Random(0), {"fact": 0, "record": 0}
    for kind in ("fact", "record") * 40:
        asked = rng.sample(statements.name_ends(), 3)
        stated = rng.sample([str(n) for n in range(10, 100)], 3)
        text: list[str] = []
        for name, value in zip(asked, stated, strict=True):
            said = f"The code of {name} is" if kind == "fact" else f"Now consider {name} . Its code is"
            text += [*said.split(), value, "."]
        text += ["Q", ":", "What", "is", "The", "code", "of", asked[1], "?", "\n", "A", ":"]
        ids = torch.tensor([[1, *(token[word] for word in text)]])
        with torch.inference_mode():
            logits = model(ids, torch.arange(ids.shape[1])[None])[0, -1, [token[value] for value in stated]]
        right[kind] += int(logits.argmax()) == 1
    assert min(right.values()) >= 22, right


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "matrices"), [(2, 3), (3, 1)], ids=["uneven", "fewer matrices than processes"])
def test_processes_share_the_work_of_muon_and_of_the_gradients(tmp_path: Path, processes: int, matrices: int) -> None:
    script = tmp_path / "step.py"
    script.write_text(_STEP_TOGETHER)
    subprocess.run([sys.executable, str(script), str(processes), str(matrices)], check=True, timeout=120)
    alone = [torch.nn.Parameter(torch.full((4, 6), 0.5)) for _ in range(matrices)]
    for i, p in enumerate(alone):
        p.grad = torch.stack([_gradient(rank, i) for rank in range(processes)]).mean(0)
    Muon([{"params": alone}], lr=0.1).step()
    for rank in range(processes):
        for ours, theirs in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(theirs, ours.data)


def _gradient(rank: int, index: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * rank + index))


_STEP_TOGETHER = """
import sys
import torch
from pathlib import Path
from kvloom.bench.reference.muon import Muon
from kvloom.bench.reference.train import mean_over_processes

folder = Path(__file__).parent
processes, matrices = map(int, sys.argv[1:])

def step(rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    parameters = [torch.nn.Parameter(torch.full((4, 6), 0.5)) for _ in range(matrices)]
    for i, p in enumerate(parameters):
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * rank + i))
    mean_over_processes(parameters)
    Muon([{"params": parameters}], lr=0.1).step()
    torch.save([p.data for p in parameters], folder / f"{rank}.pt")

if __name__ == "__main__":
    torch.multiprocessing.spawn(step, nprocs=processes)
"""


@pytest.mark.slow
def test_training_learns_resumes_and_exports_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.txt").write_text("\n".join(PARAGRAPHS))
    run, out = tmp_path / "run", tmp_path / "model"
    args = argparse.Namespace(
        corpus=tmp_path,
        run=run,
        minutes=0.05,
        layers=4,
        batch_tokens=512,
        muon_lr=0.02,
        adam_lr=3e-3,
        seed=0,
        compile=False,
        processes=1,
    )
    monkeypatch.setattr(train, "stage", lambda progress: train.Stage((64,), 0.5, 0.5, 0.5, 0.3))
    train.launch(args)
    first = torch.load(run / "checkpoint.pt", weights_only=True)
    args.minutes = (2.0 * first["elapsed_s"] + 3.0) / 60.0  # the first step alone may take seconds
    train.launch(args)
    second = torch.load(run / "checkpoint.pt", weights_only=True)
    assert 0 < first["step"] < second["step"]
    assert second["tokens"] > first["tokens"]
    assert second["elapsed_s"] > first["elapsed_s"] + 3.0 >= 6.0

    train.export(run, out)
    ids = torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(0))
    own = network.Model(network.ModelConfig(**second["config"]))
    # The export is rounded to bfloat16: compare the same rounded weights, in float32.
    own.load_state_dict({name: tensor.bfloat16().float() for name, tensor in second["model"].items()})
    exported, _ = evaluate.load(out)
    with torch.inference_mode():
        expected = own(ids, torch.arange(48).expand(2, -1))
        torch.testing.assert_close(exported(ids).logits, expected, atol=1e-4, rtol=1e-4)
    uniform = torch.log(torch.tensor(float(own.c.vocab)))
    rows = evaluate.windows(PreTrainedTokenizerFast.from_pretrained(out), PARAGRAPHS)[:1, :200]
    assert evaluate.language_losses(exported, rows)[0] < uniform - 1.0
