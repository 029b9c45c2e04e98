"""Level tables: k-means in one dimension, and the tables of a layer."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.compress.nuq.levels import fit_levels, midpoints, nearest, quantile, tempered
from kvloom.compress.nuq.nuq_fit import FitOptions, fit_layer


def cost(values: Tensor, weights: Tensor, levels: Tensor) -> float:
    distance = (values.double()[:, None] - levels.double()).abs().amin(1)
    return float((weights.double() * distance**2).sum())


def best_cost(values: Tensor, weights: Tensor, count: int) -> float:
    """Of all ways to cut the sorted values into `count` runs."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    least = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(values))):
            w, x = weights[a:b], values[a:b]
            mean = (w * x).sum() / w.sum()
            total += float((w * (x - mean) ** 2).sum())
        least = min(least, total)
    return least


def test_finds_separate_clusters() -> None:
    values = torch.tensor([-5.0, -5.2, -4.8, 0.0, 0.1, -0.1, 3.0, 3.0, 9.0])
    levels = fit_levels(values, torch.ones(9), 4)
    assert torch.allclose(levels, torch.tensor([-5.0, 0.0, 3.0, 9.0]), atol=1e-6)


def test_levels_of_the_normal_distribution() -> None:
    """Max, IRE Transactions 1960, table I."""
    share = (torch.arange(100_000) + 0.5) / 100_000
    values = 2**0.5 * torch.erfinv(2 * share.double() - 1)
    levels = fit_levels(values, torch.ones_like(values), 8, iterations=1000)
    assert torch.allclose(levels[4:], torch.tensor([0.2451, 0.7560, 1.344, 2.152]), atol=2e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=2e-3)


def test_weights_count_like_repetitions() -> None:
    random = torch.Generator().manual_seed(3)
    values, weights = torch.randn(300, generator=random), torch.randint(1, 5, (300,), generator=random)
    repeated = values.repeat_interleave(weights)
    once = fit_levels(values, weights.float(), 8)
    many = fit_levels(repeated, torch.ones(len(repeated)), 8)
    assert torch.allclose(once, many, atol=0.05)
    assert cost(values, weights, many) == pytest.approx(cost(values, weights, once), rel=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_few_values_get_the_optimum(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values, weights = torch.randn(24, generator=random) ** 3, torch.rand(24, generator=random) + 0.05
    found = cost(values, weights, fit_levels(values, weights, 4))
    assert found == pytest.approx(best_cost(values, weights, 4), rel=1e-4)
    even = torch.linspace(float(values.min()), float(values.max()), 4)
    assert found < cost(values, weights, even)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(0, 1000),
)
def test_levels_ascend_within_the_values(numbers: list[float], count: int, seed: int) -> None:
    values = torch.tensor(numbers)
    weights = torch.rand(len(values), generator=torch.Generator().manual_seed(seed))
    levels = fit_levels(values, weights, count)
    assert levels.shape == (count,) and levels.dtype == torch.float32
    assert bool((levels.diff() >= 0).all())
    slack = 1e-6 * float(values.abs().max())
    assert float(levels[0]) >= float(values.min()) - slack and float(levels[-1]) <= float(values.max()) + slack
    assert torch.equal(fit_levels(values, weights, count), levels)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    again = cost(values, weights, fit_levels(values[shuffled], weights[shuffled], count))
    assert again == pytest.approx(cost(values, weights, levels), rel=1e-3, abs=slack**2)


@pytest.mark.parametrize("unit", [1e-38, 1e38])
def test_the_unit_of_weights_does_not_matter(unit: float) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(2)).double()
    found, true = fit_levels(values, weights * unit, 4), fit_levels(values, weights, 4)
    assert torch.allclose(found, true, atol=1e-4)


def test_values_without_weight_do_not_count() -> None:
    values, weights = torch.tensor([0.0, 1.0, 100.0, -100.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert torch.equal(fit_levels(values, weights, 2), torch.tensor([0.0, 1.0]))
    assert torch.equal(fit_levels(values, torch.zeros(4), 1), torch.tensor([0.25]))


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.tensor([0.0, float("nan")]), torch.ones(2)),
        (torch.zeros(2), torch.tensor([1.0, float("inf")])),
        (torch.zeros(2), torch.tensor([1.0, -1.0])),
    ],
)
def test_refuses(values: Tensor, weights: Tensor) -> None:
    with pytest.raises(ValueError, match="values"):
        fit_levels(values, weights, 2)


@given(st.integers(1, 30), st.integers(0, 1000))
def test_nearest_is_nearest(count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    levels, values = torch.randn(2, count, generator=random).sort(-1).values, torch.randn(2, 50, generator=random)
    chosen = levels.gather(1, nearest(values, levels).long())
    least = (values[:, :, None] - levels[:, None]).abs().amin(-1)
    assert torch.allclose((values - chosen).abs(), least, atol=1e-6)
    assert midpoints(levels).shape == (2, count - 1)


def test_quantile_of_many_values() -> None:
    values = torch.arange(1001.0).flip(0)[:, None].repeat(1, 2) + torch.tensor([0.0, 5.0])
    assert torch.equal(quantile(values, 0.995), torch.tensor([995.0, 1000.0]))


def test_tempered_clips_and_mixes() -> None:
    fisher = torch.ones(1000)
    fisher[7] = 1e9
    assert torch.allclose(tempered(fisher, clip_quantile=0.99), torch.ones(1000))
    fisher = torch.cat([torch.zeros(500), torch.ones(500)])
    found = tempered(fisher, uniform_ratio=0.5)
    assert torch.allclose(found[:500], torch.tensor(0.25)) and torch.allclose(found[500:], torch.tensor(0.75))


def sample(seed: int, *, tokens: int = 2000, channels: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, channels)
    keys, values = (torch.randn(2, tokens, channels, generator=random) * scale + scale).unbind()
    fisher = torch.rand(2, tokens, channels, generator=random) / scale**2
    return keys, fisher[0], values, fisher[1]


def test_tables_of_a_layer() -> None:
    keys, key_fisher, values, value_fisher = sample(1)
    found = fit_layer(keys, key_fisher, values, value_fisher, heads=2, bits=(2, 3))
    expected = {f"nuq.keys.{name}": (16,) for name in ("low", "high", "weight")}
    expected |= {f"nuq.values.{name}": (16,) for name in ("scale", "zero", "weight")}
    for bits in (2, 3):
        expected |= {f"nuq.keys.{name}.{bits}": (16,) for name in ("scale", "zero")}
        for half in ("keys", "values"):
            expected |= {f"nuq.{half}.levels.{bits}": (2, 2**bits), f"nuq.{half}.q_norm.{bits}": (2,)}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    outside = ((keys < found["nuq.keys.low"]) | (keys > found["nuq.keys.high"])).float().mean(0)
    assert torch.allclose(outside, torch.tensor(0.01), atol=2e-3)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all()), name
        if ".levels." in name:
            assert bool((tensor.diff(dim=1) > 0).all())
        if ".scale" in name:
            assert bool((tensor > 0).all())
    again = fit_layer(keys, key_fisher, values, value_fisher, heads=2, bits=(2, 3))
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_further_rounds_err_less() -> None:
    keys, _, values, _ = sample(2)
    keys[:, ::2] = keys[:, ::2] ** 3  # thresholds far out, where few numbers are: a poor scale
    fisher = (1 / keys.var(0)).expand_as(keys)

    def error(rounds: int) -> float:
        found = fit_layer(keys, fisher, values, fisher, bits=(2,), outlier_ratio=0.0, options=FitOptions(rounds=rounds))
        scale, zero = found["nuq.keys.scale.2"], found["nuq.keys.zero.2"]
        levels = found["nuq.keys.levels.2"]
        codes = nearest(((keys - zero) / scale).reshape(1, -1), levels)
        decoded = levels.gather(1, codes.long()).view_as(keys) * scale + zero
        return float((fisher * (decoded - keys) ** 2).sum())

    assert error(4) < 0.9 * error(1)


def test_levels_move_to_where_errors_cost() -> None:
    keys, _, values, _ = sample(3)
    median = keys.median(0).values
    fisher = torch.where(keys > median, 100.0, 1.0)
    found = fit_layer(keys, fisher, values, torch.ones_like(values), bits=(4,))
    decoded = found["nuq.keys.levels.4"].mT * found["nuq.keys.scale.4"] + found["nuq.keys.zero.4"]
    above = (decoded > median).sum(0).float().mean()
    even = fit_layer(keys, torch.ones_like(keys), values, torch.ones_like(values), bits=(4,))
    decoded = even["nuq.keys.levels.4"].mT * even["nuq.keys.scale.4"] + even["nuq.keys.zero.4"]
    assert float(above) >= float((decoded > median).sum(0).float().mean()) + 1


def test_evenly_spaced_levels_for_comparison() -> None:
    found = fit_layer(*sample(4), bits=(2,), options=FitOptions(nonuniform=False, fisher=False))
    assert torch.equal(found["nuq.keys.levels.2"], torch.linspace(-1, 1, 4)[None])
    assert torch.equal(found["nuq.values.weight"], torch.ones(16))


def test_a_dead_channel_and_a_latent_cache() -> None:
    keys, key_fisher, values, value_fisher = sample(5)
    keys[:, 3] = 7.0
    values[:, 5] = 0.0
    found = fit_layer(keys, key_fisher, values, value_fisher)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    latent = fit_layer(keys, key_fisher, values[:, :0], value_fisher[:, :0])
    assert latent.keys() == {name for name in found if "keys" in name}
    assert all(torch.equal(latent[name], found[name]) for name in latent)


@pytest.mark.parametrize("change", [0, 1, 2, 3])
def test_refuses_samples(change: int) -> None:
    arguments = list(sample(6))
    with pytest.raises(ValueError, match="heads"):
        fit_layer(*arguments, heads=3)
    arguments[change] = arguments[change][:-1]
    with pytest.raises(ValueError, match="Fisher information"):
        fit_layer(*arguments)
    arguments = list(sample(6))
    arguments[change][0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        fit_layer(*arguments)
