import numpy as np
import pytest

from grpo_trl.seeds import derive_seed, uniforms


def test_a_seed_follows_from_its_parts_alone():
    assert derive_seed(0, "prompts", 1) == derive_seed(0, "prompts", 1)
    # A resumed run must draw what the first one drew, also on another machine and another version of Python.
    assert derive_seed(42, "generation_batch", 3, 0) == 8_886_628_592_675_117_506


def test_other_parts_give_other_seeds_that_torch_accepts():
    parts = [
        (0,),
        (1,),
        ("0",),
        (0, 0),
        (0, "a"),
        ("0a",),
        ("ab", "c"),
        ("a", "bc"),
        (0, "generation_batch", 1, 0),
        (0, "generation_batch", 0, 1),
    ]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_follows_from_its_names_alone():
    # completions must be drawn again where a run is resumed, also on another machine and another version of numpy
    assert uniforms(42, 3, 3).tolist() == [0.6969172265857131, 0.7709902368265988, 0.5832969427847101]


def test_noise_is_made_of_52_bits_in_float64_from_0_to_below_1():
    noise = uniforms(9, 0, 50_000)
    assert noise.shape == (50_000,)
    assert noise.dtype == np.float64
    assert noise.min() >= 0
    assert noise.max() <= (2**52 - 1) / 2**52
    scaled = noise * 2.0**52
    assert np.array_equal(scaled, np.floor(scaled))
    assert (scaled % 2 == 1).mean() == pytest.approx(0.5, abs=0.02)
    assert uniforms(9, 0, 0).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 2, 100, 999])
def test_less_noise_is_the_beginning_of_more(count):
    assert np.array_equal(uniforms(5, 2, count), uniforms(5, 2, 1000)[:count])


def test_other_names_give_other_noise():
    names = [(s, g) for s in (0, 1, 2, 10, 11, 110, 2**62, 2**63 - 1) for g in range(12)]
    assert len({tuple(uniforms(s, g, 2)) for s, g in names}) == len(names)
    assert len({x for s, g in names for x in uniforms(s, g, 50)}) == 50 * len(names)


def test_noise_is_uniform_over_positions_completions_and_seeds():
    samples = {
        "positions": uniforms(0, 0, 20_000),
        "completions": np.array([uniforms(0, g, 1)[0] for g in range(20_000)]),
        "seeds": np.array([uniforms(s, 0, 1)[0] for s in range(20_000)]),
    }
    for values in samples.values():
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 52  # chi-square with 19 degrees of freedom: 1 in 10,000 is above


def test_noise_of_neighbours_is_independent():
    table = np.array([[uniforms(s, g, 4) for g in range(4)] for s in range(4000)])
    columns = table.reshape(4000, 16).T
    correlations = np.corrcoef(columns) - np.eye(16)
    assert abs(correlations).max() < 5 / 4000**0.5
    shifted = [np.corrcoef(table[:-1, g, t], table[1:, g, t])[0, 1] for g in range(4) for t in range(4)]
    assert max(map(abs, shifted)) < 5 / 4000**0.5
