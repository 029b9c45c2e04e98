"""Calibration: the layer-by-layer gradients are those of a plain backward pass, and profiles come out whole."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kvloom import cli
from kvloom.blend.correction import Correction
from kvloom.calibration.layer_sample import LayerSample
from kvloom.calibration.model_profile import Profile
from kvloom.certify.calibrate_model import calibrate, stage_units
from kvloom.certify.method_fits import LAYER_FITS
from kvloom.compress.registry import CODECS, codec_by_name
from kvloom.connectors.hf.model import TransformersModel
from kvloom.core import KVChunk
from kvloom.errors import EngineError
from kvloom.evaluation.models import load_model
from kvloom.evaluation.windows import string_windows, token_windows
from kvloom.retrieval.kernels.code_ops import vq_scores
from kvloom.retrieval.selector import LayerShape
from kvloom.retrieval.vq.codebook import Codebook
from kvloom.retrieval.vq.vq import VqIndex
from kvloom.retrieval.vq.vq_fit import distance_bands, fit_layer

from ..support.models import DOCUMENTS, make_model, make_tokenizer, make_variant, prefill

WINDOWS = [list(range(5, 45)), list(range(100, 133)), [7, 7, 9, 300, 11]]


def plain_backward(model: PreTrainedModel, ids: list[int]) -> list[tuple[Tensor, ...]]:
    """Keys before rotation and values `[T, H, D]` of every layer, and gradients of the summed loss."""
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, name: str) -> Callable[..., Tensor]:
        def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
            seen[layer, name] = output.requires_grad_() if output.is_leaf else output
            return output

        return hook

    handles = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        keys = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        handles.append(keys.register_forward_hook(keep(index, "keys")))
        handles.append(attention.v_proj.register_forward_hook(keep(index, "values")))
    tokens = torch.tensor([ids])
    logits = model(tokens, use_cache=False).logits[0]
    loss = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
    gradients = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
    for handle in handles:
        handle.remove()
    heads = model.config.num_key_value_heads
    return [
        tuple(
            t.detach().reshape(len(ids), heads, -1)
            for t in (seen[i, "keys"], seen[i, "values"], gradients[i, "keys"], gradients[i, "values"])
        )
        for i in range(len(model.model.layers))
    ]


class Samples:
    """A fit that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[LayerSample] = []

    def __call__(self, sample: LayerSample) -> Mapping[str, Tensor]:
        self.found.append(sample)
        return {"mean.keys": sample.keys.mean(0), "mean.value_fisher": sample.value_fisher.mean(0)}


def assert_near(found: Tensor, true: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == true.shape
    assert (found - true).norm() <= 1e-5 * true.norm() and float(true.norm()) > 0


MODELS = {
    "llama": lambda: make_model("llama"),
    "qwen3 (key norms)": lambda: make_model("qwen3"),
    "qwen2 (biases)": lambda: make_model("qwen2"),
    "yarn": lambda: make_model("llama", rope="yarn"),
    "window": lambda: make_variant("window"),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_plain_backward_pass(name: str) -> None:
    model, samples = MODELS[name](), Samples()
    profile = calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": samples}, skip_tokens=1)
    scaling = profile.spec.rope.attention_scaling  # codecs keep keys with it: a rotation takes no amplitude off
    assert (scaling == 1.0) == (name != "yarn")
    true = [plain_backward(model, ids) for ids in WINDOWS]
    for layer, sample in enumerate(reversed(samples.found)):
        keys, values, key_gradients, value_gradients = (
            torch.cat([of_window[layer][part][1:] for of_window in true]) for part in range(4)
        )
        assert_near(sample.keys, keys * scaling)
        assert_near(sample.values, values)
        assert_near(sample.key_fisher, (key_gradients / scaling) ** 2)
        assert_near(sample.value_fisher, value_gradients**2)
        assert torch.equal(profile["mean.keys"][layer], sample.keys.mean(0))  # layers in their order
    assert profile["mean.value_fisher"].shape == (4, 2, 8)


@pytest.mark.parametrize("name", ["llama", "qwen3 (key norms)", "yarn"])
def test_moments_of_queries_are_those_before_rotation(name: str) -> None:
    model, samples, seen = MODELS[name](), Samples(), []
    strings = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3]]
    profile = calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": samples}, strings=strings, skip_tokens=1)
    for layer in model.model.layers:
        attention = layer.self_attn
        queries = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
        queries.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].reshape(-1, 4, 8)))
    with torch.no_grad():
        for ids in (*WINDOWS, *strings):
            model(torch.tensor([ids]), use_cache=False)
    scaling = profile.spec.rope.attention_scaling
    for layer, sample in enumerate(reversed(samples.found)):
        each = torch.cat([t[1:] for t in seen[layer::4]]).double() * scaling  # first tokens are no samples
        grouped = each.view(-1, 2, 2, 8).transpose(0, 1).reshape(2, -1, 8)
        torch.testing.assert_close(sample.query_moments, grouped.mT @ grouped / grouped.shape[1], rtol=1e-4, atol=1e-6)


def test_strings_count_for_nothing_but_their_keys_and_queries() -> None:
    model, strings = make_model("llama"), [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3]]
    plain, more = Samples(), Samples()
    profiles = [
        calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": samples}, strings=of_strings)
        for samples, of_strings in ((plain, ()), (more, strings))
    ]
    assert profiles[0].fingerprint == profiles[1].fingerprint
    assert profiles[1].meta["string_tokens"] == "10" and profiles[1].meta["tokens"] == profiles[0].meta["tokens"]
    true = [prefill(model, ids) for ids in strings]
    for layer, (without, sample) in enumerate(zip(reversed(plain.found), reversed(more.found), strict=True)):
        assert without.further_keys.shape == (0, 2, 8)
        rope = profiles[0].spec.rope
        keys = [rope.shift(t.keys[layer], -torch.arange(t.keys.shape[2])).transpose(0, 1)[1:] for t in true]
        assert_near(sample.further_keys, torch.cat(keys))
        assert not torch.equal(sample.query_moments, without.query_moments)


def test_the_hidden_states_may_lie_in_a_file() -> None:
    model = make_model("llama")
    both = [
        calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": Samples()}, memory_bytes=nbytes)
        for nbytes in (1 << 30, 0)
    ]
    assert both[0].fingerprint == both[1].fingerprint


def test_other_tokens_make_another_profile() -> None:
    model = make_model("llama")
    fits = {"mean": Samples()}
    a, b, c = (
        calibrate(model, windows, model_id="m", layer_fits=fits, skip_tokens=skip_tokens)
        for windows, skip_tokens in ((WINDOWS, 1), (WINDOWS[:2], 1), (WINDOWS, 2))
    )
    assert len({a.fingerprint, b.fingerprint, c.fingerprint}) == 3
    assert a.meta["sequences"] == "3" and a.meta["tokens"] == "78" and float(a.meta["loss"]) > 0


def test_the_model_stays_as_it_was() -> None:
    model = make_model("llama")
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():  # callers may be within it
        calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": Samples()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_progress_adds_up() -> None:
    done = {"forward": 0, "backward": 0, "fit": 0}

    def advance(stage: str, tokens: int) -> None:
        done[stage] += tokens

    strings, fits = [[5, 6, 7, 8]], {"mean": Samples()}
    calibrate(make_model("llama"), WINDOWS, model_id="m", advance=advance, strings=strings, layer_fits=fits)
    assert done == stage_units(4, WINDOWS, strings=strings) and done["backward"] == 4 * 78


@pytest.mark.slow
def test_every_codec_works_with_the_profile_of_every_method() -> None:
    if not LAYER_FITS:
        pytest.skip("no method learns anything yet")
    model = make_model("llama")
    random = torch.Generator().manual_seed(0)
    profile = calibrate(model, [torch.randint(1, 500, (300,), generator=random).tolist()], model_id="m")
    assert all(len(t) == 4 and bool(t.float().isfinite().all()) for t in profile.tensors.values())
    true = prefill(model, WINDOWS[0])
    ids = torch.tensor(WINDOWS[0])
    chunk = KVChunk(profile.spec, ids, torch.arange(len(ids)), true.keys, true.values)
    for name in CODECS:
        codec = codec_by_name(name, profile)
        found = codec.decode(codec.encode(chunk))
        for half in ("keys", "values"):
            exact, other = getattr(chunk, half), getattr(found, half)
            assert (exact - other).norm() <= (0.5 if "2" in name else 0.25) * exact.norm(), (name, half)


def test_an_index_works_with_the_codebooks_of_the_profile() -> None:
    pytest.importorskip("faiss")
    model, random = make_model("llama"), torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 500, (400,), generator=random).tolist() for _ in range(4)]
    fits = {"vq": partial(fit_layer, centroids=512, bands=distance_bands(256, per_doubling=1))}
    profile = calibrate(model, windows[1:], model_id="m", layer_fits=fits)
    assert {name: list(t.shape) for name, t in profile.tensors.items()} == {
        "vq.centroids": [4, 2, 128, 8],  # 1197 keys, at least 8 of them for each
        "vq.factor": [4, 2, 8, 8],
        "vq.bands": [4, 3, 2],
    }
    layers = TransformersModel(model, model_id="m")
    with torch.no_grad():
        hidden, positions = layers.embed(torch.tensor(windows[0])), torch.arange(400)
        queries, keys, values = layers.qkv(0, hidden, positions)
    shape = LayerShape(2, 2, 8, layers.attention[0].scale, layers.spec.rope)
    books = [Codebook.from_profile(profile, layer, spec=layers.spec) for layer in (0, 3)]
    unrotated = layers.spec.rope.shift(keys, -positions)
    scores = []
    for book in (replace(books[0], centroids=unrotated), *books):  # the first without quantisation
        index = VqIndex(shape, book)
        index.add(keys[:, :336], values[:, :336])
        table, band_starts = index.score_table(queries[:, -1], 399)
        scores.append(vq_scores(table, index.packed, 336, band_starts=band_starts))
    errors = [float((found - scores[0]).square().mean() / scores[0].square().mean()) for found in scores[1:]]
    assert errors[0] < 0.5 * errors[1], errors  # those of another layer are of less use


@pytest.mark.parametrize("windows", [[], [[1]], [[1, 2]], [list(range(400)) + list(range(200))]])
def test_refuses_sequences_of_wrong_length(windows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="expected at least one, each of more than 2 and at most 512"):
        calibrate(make_model("llama"), windows, model_id="m")


def test_refuses_a_model_that_has_lost_its_mind() -> None:
    model = make_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(EngineError, match="loss over the text is nan"):
        calibrate(model, WINDOWS, model_id="m", layer_fits={"mean": Samples()})


# ------------------------------------------------------------------------------------------------------- windows


def test_windows_are_spread_over_the_text_behind_the_bos() -> None:
    tokenizer = make_tokenizer(bos=True)
    ids = [token for text in DOCUMENTS for token in tokenizer(text, add_special_tokens=False).input_ids]
    windows = token_windows(tokenizer, DOCUMENTS, sequences=3, tokens=17, least_tokens=16)
    assert [len(window) for window in windows] == [17] * 3 and {window[0] for window in windows} == {0}
    assert windows[0][1:] == ids[:16] and windows[-1][1:] == ids[-16:]
    assert windows[1][1:] == ids[(len(ids) - 16) // 2 :][:16]
    assert token_windows(make_tokenizer(bos=False), DOCUMENTS, sequences=1, tokens=17, least_tokens=16) == [ids[:17]]


def test_short_texts_give_fewer_or_shorter_windows() -> None:
    tokenizer = make_tokenizer(bos=True)
    count = len([t for text in DOCUMENTS for t in tokenizer(text, add_special_tokens=False).input_ids])
    assert [len(w) for w in token_windows(tokenizer, DOCUMENTS, tokens=2048, least_tokens=16)] == [count + 1]
    assert len(token_windows(tokenizer, DOCUMENTS, tokens=count // 2, least_tokens=16)) == 2
    with pytest.raises(ValueError, match=rf"the text has {count} tokens; expected at least 512: give more --text"):
        token_windows(tokenizer, DOCUMENTS)
    with pytest.raises(ValueError, match="0 sequences of 5 tokens"):
        token_windows(tokenizer, DOCUMENTS, sequences=0, tokens=5)


def test_strings_are_random_identifiers() -> None:
    tokenizer = make_tokenizer(bos=True)
    found = string_windows(tokenizer, sequences=3, tokens=300)
    assert [len(window) for window in found] == [300] * 3 and {window[0] for window in found} == {0}
    assert (
        found
        == string_windows(tokenizer, sequences=3, tokens=300)
        != string_windows(tokenizer, sequences=3, tokens=300, seed=1)
    )
    assert len({tuple(window) for window in found}) == 3
    text = tokenizer.decode(found[0][1:]).split(", ")
    assert len(text) > 4 and all(str(uuid.UUID(string)) == string for string in text[:-1])
    with pytest.raises(ValueError, match="expected at least 0 of at least 2"):
        string_windows(tokenizer, sequences=-1, tokens=300)


# -------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS) * 6)
    return path


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main([str(arg) for arg in args])
    return int(leave.value.code or 0)


def test_command(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in list(LAYER_FITS):
        monkeypatch.delitem(LAYER_FITS, method)
    monkeypatch.setitem(LAYER_FITS, "mean", Samples())
    out = tmp_path / "profile.safetensors"
    out.write_text("what was there before")
    assert run("calibrate", folder, "--text", text, "-o", out, "--sequences", 2, "--tokens", 100) == 0
    profile = Profile.load(out)
    assert profile.spec == TransformersModel(load_model(folder)[0]).spec and profile["mean.keys"].shape == (4, 2, 8)
    assert (profile.meta["sequences"], profile.meta["tokens"], profile.meta["texts"]) == ("2", "200", str(text))
    shown = capsys.readouterr().out
    assert ["mean", "2", "512"] in [line.split() for line in shown.splitlines()] and "2 sequences, 200 tokens" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.safetensors", "text.txt"]
    assert run("calibrate", folder, "--text", text, "-o", out, "--tokens", 100, "--model-id", "mine") == 0
    assert Profile.load(out).spec.model_id == "mine"
    correction = Correction.from_profile(profile)
    assert correction is not None and correction.weights.shape == (4, 2, 16, 16) and bool(correction.weights.any())
    assert run("calibrate", folder, "--text", text, "-o", out, "--sequences", 1, "--tokens", 60) == 0
    assert Correction.from_profile(Profile.load(out)) is None
    assert "nothing for fusion, which needs two documents" in capsys.readouterr().out


def test_command_fits_codebooks(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    for method in set(LAYER_FITS) - {"vq"}:
        monkeypatch.delitem(LAYER_FITS, method)
    out = tmp_path / "profile.safetensors"
    args = ("calibrate", folder, "--text", text, "-o", out, "--sequences", 4, "--tokens", 128, "--centroids", 32)
    assert run(*args) == 0
    profile = Profile.load(out)
    assert profile["vq.centroids"].shape == (4, 2, 32, 8)
    assert profile.meta["string_tokens"] == "128"  # a quarter of the text
    assert Codebook.from_profile(profile, 2).bands == tuple(distance_bands(512))


def test_command_says_what_is_wrong(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short, empty = tmp_path / "profile", tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("Too short.")
    empty.write_text(" \n")
    gpt = tmp_path / "gpt"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=512)).save_pretrained(gpt)
    make_tokenizer(bos=True).save_pretrained(gpt)
    capsys.readouterr()
    for args, message in (
        ((folder,), "no text; name files or folders of it with --text"),
        ((folder, "--text", short), "tokens; expected at least 512: give more --text"),
        ((folder, "--text", empty), "holds no text"),
        ((folder, "--text", tmp_path / "missing.txt"), "there is no file or folder"),
        ((tmp_path / "missing", "--text", text), "no model in"),
        ((gpt, "--text", text), "has no decoder with a list of layers"),
        ((folder, "--text", text, "--dtype", "int3"), "dtype is 'int3'; expected one of auto, float32"),
    ):
        assert run("calibrate", *args, "-o", out) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert run("calibrate", folder, "--text", text, "-o", tmp_path / "no" / "folder") == 2
    assert "cannot write" in capsys.readouterr().err
