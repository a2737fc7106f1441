"""Classifiers of vectors and their two-sample test, against closed forms and scikit-learn."""

import math

import numpy as np
import pytest
import torch

from musigma.comparison.networks import Classifiers, held_out, vector_c2st


def test_probabilities_are_those_of_the_posterior():
    torch.manual_seed(0)
    labels = (torch.rand(2, 4000) < torch.tensor([[0.5], [0.2]])).long()
    x = torch.randn(2, 4000, 3)
    x[..., 0] += 1.5 * labels
    found = held_out(x, labels, hidden=[32, 32], epochs=8)
    odds = torch.tensor([[0.0], [math.log(0.2 / 0.8)]]) + 1.5 * x[..., 0] - 1.5**2 / 2
    assert (found - odds.sigmoid()).abs().mean() < 0.04


def test_networks_read_their_own_set_and_rows():
    torch.manual_seed(1)
    x = torch.randn(400, 2)
    labels = torch.stack([x[:, 0] > 0, x[:, 0] < 0]).long()
    rows = torch.stack([torch.arange(200), torch.arange(200, 400)]).repeat(2, 1)
    networks = Classifiers(4, 2, hidden=[16])
    networks.fit(x, labels, rows=rows, epochs=40, batch_size=50)
    p = networks.probabilities(x)
    for k, p_k in enumerate(p):
        assert ((p_k > 0.5) == labels[k // 2]).float().mean() > 0.95
    assert not torch.equal(p[0], p[1])
    torch.testing.assert_close(networks.select(slice(2, 4)).probabilities(x), p[2:])


def test_held_out_rows_do_not_train_their_network():
    torch.manual_seed(2)
    x, labels = torch.randn(2, 200, 2), torch.randint(0, 2, (2, 200))
    found = held_out(x, labels, epochs=60, batch_size=50)
    right = ((found > 0.5) == labels).double().mean()  # noise, which networks can memorize
    assert abs(right - 0.5) < 4 * math.sqrt(0.25 / 400)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_accuracy_of_two_gaussians(shift):
    torch.manual_seed(3)
    first, second = torch.randn(2, 2, 2000, 3)
    second[1, :, 0] += shift
    found = vector_c2st(
        first * torch.tensor([1.0, 100.0, 0.01]) + 5,
        second * torch.tensor([1.0, 100.0, 0.01]) + 5,
        epochs=8,
    )
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    assert abs(found[0] - 0.5) < 0.03
    assert abs(found[1] - best) < 0.03


def test_same_figure_as_scikit_learn():
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    torch.manual_seed(4)
    first = torch.randn(1000, 2)
    second = torch.randn(1000, 2) * torch.tensor([0.5, 1.0])
    x = ((torch.cat([first, second]) - first.mean(0)) / first.std(0)).numpy()
    net = MLPClassifier((20, 20), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    peer = cross_val_score(net, x, np.repeat([0, 1], 1000), cv=folds).mean()
    assert abs(float(vector_c2st(first, second)) - peer) < 0.025


def test_faults():
    x = torch.randn(50, 2)
    with pytest.raises(ValueError, match=r"one shape.*\(50, 2\) and \(50, 3\)"):
        vector_c2st(x, torch.randn(50, 3))
    with pytest.raises(ValueError, match="finite"):
        vector_c2st(x, x.clone().index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(ValueError, match="divides the 3 networks"):
        Classifiers(3, 2).fit(torch.randn(2, 50, 2), torch.zeros(50))
    with pytest.raises(ValueError, match=r"expected \(S, N, 2\)"):
        Classifiers(3, 2).fit(torch.randn(50, 4), torch.zeros(50))
