from __future__ import annotations

import pytest
from torch import nn

from distiller.early_exit import exit_places
from distiller.errors import DistillerError, GraphTraceError, UsageError
from distiller.models import create_model
from tests.early_exit.nets import Chain, Residual, seeded


def test_every_layer_of_a_chain_but_the_last_is_a_place():
    places = exit_places(seeded(Chain))
    assert places.good == {"conv1", "bn1", "relu1", "pool", "conv2", "relu2", "flatten", "hidden", "relu3"}
    assert places.shown[:3] == ("conv1", "bn1", "relu1")


def test_within_a_residual_block_is_none_and_behind_it_is_one():
    places = exit_places(seeded(Residual))
    assert places.good == {"stem", "block1", "block2"}
    with pytest.raises(UsageError) as caught:
        places.check("block2.conv")
    assert str(caught.value) == (
        "early exit: 'block2.conv' is no place for one, the network has another way past it, or ends there; "
        "name 'block1' or 'block2'"
    )


def test_what_passes_its_input_on_and_the_end_are_none():
    places = exit_places(seeded(Residual))
    with pytest.raises(UsageError) as caught:
        places.check("drop")
    assert str(caught.value) == (
        "early exit: 'drop' only passes its input on, or does not run; name 'block2'"
    )
    with pytest.raises(UsageError) as caught:
        places.check("fc")
    assert str(caught.value) == (
        "early exit: 'fc' is no place for one, the network has another way past it, or ends there; name 'block2'"
    )


def test_the_stages_of_a_resnet_are_places_and_so_are_its_blocks():
    places = exit_places(create_model(False, "digits", "resnet20_cifar"))
    assert {"layer1", "layer1.2", "layer1.2.relu2", "layer2.0", "relu", "avgpool"} <= places.good
    assert not {"layer1.0.relu1", "layer2.0.downsample", "layer1.0.bn2", "fc"} & places.good
    assert "layer1" in places.shown
    assert "layer1.2" not in places.shown  # the same result


def test_a_network_that_reads_its_input_again_has_no_place_before_that():
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
            self.input_shape = (1, 4)

        def forward(self, x):
            return self.third(self.second(self.first(x)) + x)

    places = exit_places(Again())
    assert places.good == frozenset()
    with pytest.raises(UsageError, match="this network has no place for one$"):
        places.check("first")


def test_a_layer_that_is_called_twice_is_none():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()
            self.input_shape = (1, 4)

        def forward(self, x):
            return self.b(self.act(self.a(self.act(x))))

    assert exit_places(Twice()).good == {"a"}


def test_a_network_that_cannot_be_traced_is_refused():
    class Branching(Chain):
        def forward(self, input):
            return super().forward(input) if input.sum() > 0 else super().forward(-input)

    with pytest.raises(GraphTraceError, match="^Branching: torch.export cannot trace it for early exit: "):
        exit_places(Branching())


def test_a_model_has_to_say_its_input_shape():
    model = Chain()
    del model.input_shape
    with pytest.raises(DistillerError) as caught:
        exit_places(model)
    assert str(caught.value) == (
        "'early exit' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
    )
