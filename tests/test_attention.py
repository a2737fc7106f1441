"""Attention: its equation, with and without autocast."""

import math

import pytest
import torch

from musigma.nets import attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_is_the_mean_of_values_by_a_softmax(dtype, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 6).to(dtype)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    scores = q.double() @ k.double().mT / math.sqrt(6)
    expected = scores.masked_fill(~mask if masked else torch.tensor(False), -math.inf)
    expected = expected.softmax(-1) @ v.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float64):
        found = attention.attend(q, k, v, mask)
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_long_attention_stays_in_the_precision_of_autocast():
    q, k, v = torch.randn(3, 1, 1, attention.LONG, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.attend(q, k, v).dtype == torch.bfloat16
