"""Operations over the members axis: on a CPU they are torch's own. What they are for is in gpu/test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from rnnq.families import stacked

torch.set_num_threads(1)


@pytest.mark.parametrize("members", [1, 5])
def test_on_a_cpu_products_and_means_are_torchs_to_the_bit(members: int) -> None:
    chance = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(members, *shape, generator=chance) for shape in ((25, 21), (21, 7), (1, 7)))
    assert torch.equal(stacked.bmm(a, b), torch.bmm(a, b))
    assert torch.equal(stacked.baddbmm(c, a, b), torch.baddbmm(c, a, b))
    assert torch.equal(stacked.mean(a), a.mean((1, 2)))
    assert torch.equal(stacked.mean(a[..., 0]), a[..., 0].mean(1))


@pytest.mark.parametrize("shape", [(3, 5), (3, 25, 7), (1, 300, 1)])
def test_the_mean_of_a_gpu_has_the_value_and_the_gradient_of_a_mean(shape: tuple[int, ...]) -> None:
    """Its kernel is there on a CPU, too."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    found = stacked._Mean.apply(x)  # type: ignore[no-untyped-call]
    expected = x.mean(tuple(range(1, x.dim())))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    mine, its = (torch.autograd.grad((value * weights).sum(), x)[0] for value in (found, expected))
    torch.testing.assert_close(mine, its, rtol=1e-12, atol=0)
