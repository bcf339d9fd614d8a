"""Small networks for 28x28 images: LeNet-300-100, LeNet-5 and Distiller's two simplenets.

Knows nothing about data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model

_SHAPE = (1, 28, 28)


class LeNet300100(nn.Module):
    """A multi-layer perceptron with 300 and 100 hidden units; 266,610 parameters for grey images, 10 classes.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3; the inputs are in_channels * 784.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * 28 * 28, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 28, 28) -> (batch, num_classes)."""
        x = self.relu1(self.fc1(torch.flatten(x, 1)))
        x = self.relu2(self.fc2(x))
        return self.fc3(x)


class LeNet5(nn.Module):
    """The LeNet-5 of the pruning papers, Caffe's 20-50-500; 431,080 parameters for grey images, 10 classes.

    As in Caffe, the convolutions are followed by pooling alone; the one ReLU follows `fc1`.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.

    Source: Jia et al., "Caffe: Convolutional Architecture for Fast Feature Embedding", 2014.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.pool1 = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 28, 28) -> (batch, num_classes)."""
        x = self.pool1(self.conv1(x))  # (batch, 20, 12, 12)
        x = self.pool2(self.conv2(x))  # (batch, 50, 4, 4)
        x = self.relu1(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


class SimpleNetMnist(nn.Module):
    """LeNet-5's layers with a ReLU after each convolution too.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 28, 28) -> (batch, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))  # (batch, 20, 12, 12)
        x = self.pool2(self.relu2(self.conv2(x)))  # (batch, 50, 4, 4)
        x = self.relu3(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


class SimpleNetV2Mnist(nn.Module):
    """A network without linear layers: a 1x1 convolution gives the classes, averaged over all positions.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, 2)
        self.conv3 = nn.Conv2d(50, num_classes, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w), h and w at least 16 -> (batch, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return torch.flatten(self.avgpool(self.conv3(x)), 1)


register_model(ModelSpec("lenet_300_100", LeNet300100, "mnist", _SHAPE, smallest_size=None))
register_model(ModelSpec("lenet5", LeNet5, "mnist", _SHAPE, smallest_size=None))
register_model(ModelSpec("simplenet_mnist", SimpleNetMnist, "mnist", _SHAPE, smallest_size=None))
register_model(ModelSpec("simplenet_v2_mnist", SimpleNetV2Mnist, "mnist", _SHAPE, smallest_size=16))
