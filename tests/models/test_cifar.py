import torch

from distiller.models import create_model


def test_simplenet_cifar_names_its_operations():
    model = create_model(False, "cifar10", "simplenet_cifar")
    assert [name for name, _ in model.named_children()] == [
        "conv1", "relu_conv1", "pool1", "conv2", "relu_conv2", "pool2",
        "fc1", "relu_fc1", "fc2", "relu_fc2", "fc3",
    ]  # fmt: skip


def test_simplenet_cifar_uses_every_operation_once():
    model = create_model(False, "cifar10", "simplenet_cifar")
    ran: list[str] = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.zeros(1, 3, 32, 32))
    assert ran == [name for name, _ in model.named_children()]
