import pytest
import torch

from grpo_trl.rollout.nucleus import least_weight


BITS = 52


def by_few(weights_RV: torch.Tensor, nucleus_R1: torch.Tensor) -> torch.Tensor:
    """Where the nucleus ends among so few in some rows only."""
    return least_weight(weights_RV, nucleus_R1, 20)


def weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 200, generator=generator, dtype=torch.float64)
    if kind == "one bin":
        return 2**40 + torch.randint(1000, (60, 200), generator=generator)
    scale = {"flat": 0.01, "usual": 2.0, "peaked": 30.0}.get(kind, 0.0)
    wide = ((logits - logits.amax(-1, keepdim=True)) * scale).exp().mul(2.0**BITS).long()
    return wide if kind != "equal" else wide.clamp(max=7)


@pytest.mark.parametrize("find", [least_weight, by_few])
@pytest.mark.parametrize("kind", ["flat", "usual", "peaked", "one bin", "equal"])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 1.0])
def test_the_nucleus_holds_the_tokens_that_have_less_than_its_mass_above_them(find, kind, top_p):
    weights_RV = weights(kind)
    nucleus_R1 = (top_p * weights_RV.sum(-1, keepdim=True).double()).ceil().long()
    least_R1 = find(weights_RV, nucleus_R1)
    assert least_R1.shape == (60, 1)
    for row, (nucleus,), (least,) in zip(weights_RV.tolist(), nucleus_R1.tolist(), least_R1.tolist(), strict=True):
        nucleus_tokens = [w for w in set(row) if sum(other for other in row if other > w) < nucleus]
        assert {w for w in row if w >= least} == set(nucleus_tokens)


@pytest.mark.parametrize("find", [least_weight, by_few])
def test_a_mass_that_is_met_exactly_ends_the_nucleus(find):
    weights_RV = torch.tensor([[4, 1, 2, 1]])
    found = {nucleus: find(weights_RV, torch.tensor([[nucleus]])).item() for nucleus in (4, 6, 7)}
    assert found == {4: 4, 6: 2, 7: 1}
