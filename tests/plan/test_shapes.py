"""Shapes of models, figures of machines, and what chunks take: known answers, and one-line refusals."""

import json
from pathlib import Path

import pytest
import torch

from kvloom.bench.plan.anchors import ANCHORS
from kvloom.bench.plan.forms import FIXED_SIZES, random_chunk, stored_form
from kvloom.bench.plan.machines import GPUS, Assumptions, gpu_by_name, read_assumptions, read_bytes, read_tier
from kvloom.bench.plan.setup import Setup, gpu_machine, measured_forms
from kvloom.bench.plan.shapes import KNOWN, read_shape
from kvloom.compress.registry import codec_by_name
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_key

SMALL = "layers=4,kv_heads=2,head_dim=64,params=1e6,heads=6"


def test_published_figures() -> None:
    for anchor in ANCHORS[:8]:
        assert anchor.error == 0.0, anchor.what
    for anchor in ANCHORS[8:]:  # times of other machines
        assert abs(anchor.error) < 0.3, anchor.what


def test_a_folder_is_counted(tmp_path: Path) -> None:
    bundled = read_shape(str(BUNDLED_MODEL))
    assert (bundled.layers, bundled.kv_heads, bundled.query_heads, bundled.head_dim) == (6, 2, 4, 64)
    block = 256 * 64 * (4 + 4 + 2 + 2) + 3 * 256 * 512 + 2 * 256
    assert bundled.computed_params == 6 * block + 256 and bundled.head_params == 3072 * 256
    assert bundled.params == bundled.computed_params + bundled.head_params
    (tmp_path / "config.json").write_text((BUNDLED_MODEL / "config.json").read_text())
    built = read_shape(str(tmp_path))  # from the configuration alone
    assert (built.params, built.computed_params) == (bundled.params, bundled.computed_params)
    assert read_shape(str(tmp_path), dtype="float32").weight_bytes == 4 * bundled.params


def test_a_folder_with_windows_and_experts(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16, "torch_dtype": "float16",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(tmp_path))
    experts, router, attention = 3 * 64 * 96, 64 * 8, 64 * 64 * 2 + 64 * 32 * 2
    block = 8 * experts + router + attention + 2 * 64
    assert shape.params == 3 * block + 64 + 2 * 100 * 64
    assert shape.computed_params == shape.params - 2 * 100 * 64 - 3 * 6 * experts
    assert shape.windows == (16, None, 16) and shape.dtype == torch.float16
    assert shape.prefill_flops(32) == pytest.approx(
        2 * shape.computed_params * 32 + 4 * 4 * 16 * (2 * (136 + 16 * 16) + 528) + 2 * shape.head_params
    )


def test_a_latent_cache(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
        "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(tmp_path))
    assert shape.spec().token_bytes == 3 * (32 + 16) * 2 and shape.pair_flops == 2 * 4 * (8 + 16 + 8)


def test_a_spelled_shape() -> None:
    shape = read_shape("layers=32,kv_heads=8,head_dim=128,params=8e9")
    assert shape.spec().token_bytes == 131072 and shape.query_heads == 32 and len(shape.assumed) == 2
    known = read_shape("layers=32,kv_heads=8,head_dim=128,params=8030261248,heads=32,vocab=128256,hidden=4096")
    assert known.computed_params == KNOWN["llama-3.1-8b"]().computed_params and not known.assumed
    assert known.prefill_flops(100, 7) == KNOWN["llama-3.1-8b"]().prefill_flops(100, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no model 'nothing'; expected a folder with config.json"),
        ("layers=32", "lacks kv_heads, head_dim, params"),
        ("layers=32,layers=3", "has 'layers=3'; expected layers"),
        ("layers=x,kv_heads=8,head_dim=128,params=8e9", "layers is 'x'; expected a number"),
        ("layers=1.5,kv_heads=8,head_dim=128,params=8e9", "layers is '1.5'; expected a whole number from 1"),
        ("layers=nan,kv_heads=8,head_dim=128,params=8e9", "layers is 'nan'"),
        ("layers=4,kv_heads=8,head_dim=128,params=8e9,size=3", "has 'size=3'; expected"),
        ("layers=4,kv_heads=8,head_dim=128,params=8e9,dtype=int8", "dtype is 'int8'; expected one of float32"),
        ("layers=4,kv_heads=8,head_dim=128,params=1e3,vocab=100,hidden=64", "params is 1,000; expected more"),
    ],
)
def test_no_shape(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        read_shape(text)
    assert message in str(refused.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[1]", "no model's configuration"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers in"),
        ('{"layer_types": ["linear_attention"], "num_hidden_layers": 1}', "layers of linear_attention"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_shape(str(tmp_path))


@pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")
@pytest.mark.parametrize("codec", sorted(FIXED_SIZES))
def test_bytes_are_those_of_the_tiers(codec: str, tmp_path: Path) -> None:
    """What a form says is what tiers in memory and on a disk account for other numbers of the same shape."""
    spec = read_shape(SMALL).spec()
    form = stored_form(codec, codec_by_name(codec), random_chunk(spec, 96, seed=1))
    host, disk = HostTier(None), DiskTier(tmp_path)
    with KVStore([host, disk], codec=codec_by_name(codec), allow_uncertified=True) as store:
        store.put(make_key(1), random_chunk(spec, 96, seed=2))
        assert host.used_bytes == form.memory_bytes == form.bytes_in("host")
        assert sum(entry.nbytes for entry in disk.entries()) == form.disk_bytes == form.bytes_in("disk")
    assert form.raw_bytes == 96 * spec.token_bytes and form.is_lossless == (codec == "raw")


def test_capacities_and_times_by_hand() -> None:
    shape, assume = read_shape(SMALL), Assumptions(step_s=0.0, compute_ratio=0.5, memory_ratio=1.0, link_ratio=0.5)
    gpu = gpu_by_name("flops=1e9,hbm=1e8,memory=1e8,link=1e6")
    machine = gpu_machine(shape, gpu, assume, gpus=2)
    setup = Setup(shape, machine, [read_tier("disk=1GB@0.001")], measured_forms(shape, ["raw"], 64), assume)
    assert setup.gpu_kv_bytes == pytest.approx(2e8 * 0.9 - 2e6)
    assert machine.prefill.seconds(1000) == pytest.approx(
        (2 * 1e6 * 1000 + 4 * 2 * 6 * 128 * 500_500) / (2 * 1e9 * 0.5)
    )
    assert machine.prefill.seconds(1, 100) == pytest.approx((2e6 + 100 * 2048) / 2e8)  # bound by memory
    load = setup.costs("raw").loads["disk"]
    form = setup.forms["raw"]
    assert load.read_s == pytest.approx(100e-6 + form.disk_bytes / 1e6)
    assert load.copy_s == pytest.approx(64 * 2048 / 1e6) and load.decode_s == 0.0
    with pytest.raises(ValueError, match=r"weights of llama-3\.1-70b take 141 GB; 1 x h100-80g has 72 GB"):
        gpu_machine(read_shape("llama-3.1-70b"), GPUS["h100-80g"], Assumptions())


def test_sizes_that_depend_on_the_model_are_not_guessed() -> None:
    shape = read_shape(SMALL)
    with pytest.raises(ValueError, match="what nuq4 takes depends on the model's KV; give a --model folder"):
        measured_forms(shape, ["nuq4"], 64)
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        measured_forms(shape, ["zip"], 64)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (gpu_by_name, "h1000", "no GPU 'h1000'; expected here"),
        (gpu_by_name, "flops=1e12", "the GPU lacks hbm, memory, link"),
        (gpu_by_name, "flops=0,hbm=1,memory=1,link=1", "flops of the GPU is 0"),
        (read_tier, "disk", "--tier is 'disk'; expected NAME=SIZE"),
        (read_tier, "disk=4XB", "--tier disk is '4XB'; expected a size"),
        (read_tier, "disk=4TB@fast", "--tier disk has 'fast' behind @"),
        (read_tier, "disk=4TB@0", "expected GB/s above 0"),
        (read_tier, "gpu=4TB", "--tier is 'gpu=4TB'"),
        (lambda text: read_assumptions([text]), "step=1", "--assume has 'step=1'; expected compute_ratio"),
        (lambda text: read_assumptions([text]), "compute_ratio=2", "compute_ratio is 2; expected a number from 0 to 1"),
        (lambda text: read_assumptions([text]), "compute_ratio=0", "compute_ratio is 0; expected more"),
        (lambda text: read_assumptions([text]), "lanes=1.5", "lanes is 1.5; expected a whole number from 1"),
        (lambda text: read_assumptions([text]), "step_s=nan", "step_s of --assume is 'nan'"),
    ],
)
def test_wrong_machines(read, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="expected") as refused:
        read(text)
    assert message in str(refused.value)


def test_sizes() -> None:
    assert [read_bytes(text, "x") for text in ("256GiB", "4TB", "1.5 kB", "12")] == [1 << 38, 4 * 10**12, 1500, 12]
