"""The oracle of layers: the Jacobian that bounds are held to."""

import torch
from torch import nn

from clustr_core.theory.oracle import layer_matrix


def test_the_matrix_of_a_linear_layer_is_its_weight():
    layer = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    found = layer_matrix(layer, torch.rand(1, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(found, layer[1].weight.detach(), rtol=0, atol=0)


def test_the_matrix_of_a_convolution_does_what_the_convolution_does():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    images = torch.rand(5, 2, 6, 5, dtype=torch.float64)
    matrix = layer_matrix(layer, images[0])
    torch.testing.assert_close(images.flatten(1) @ matrix.T, layer(images).flatten(1).detach(), rtol=1e-12, atol=1e-12)


def test_of_a_layer_that_is_not_linear_it_is_the_derivative_there():
    image = torch.tensor([[[-2.0, 3.0]]])
    assert layer_matrix(nn.ReLU(), image).tolist() == [[0, 0], [0, 1]]
