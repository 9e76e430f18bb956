from grpo_trl.seeds import derive_seed


def test_a_seed_follows_from_its_parts_alone():
    assert derive_seed(0, "prompts", 1) == derive_seed(0, "prompts", 1)
    # A resumed run must draw what the first one drew, also on another machine and another version of Python.
    assert derive_seed(42, "window", 3, 0) == 6_888_370_807_387_756_773


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
        (0, "window", 1, 0),
        (0, "window", 0, 1),
    ]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
