"""Which groups can be removed from is tried on a copy; what thinning changes is measured."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.errors import DistillerError, UsageError
from distiller.thinning import apply_recipe, thinning_recipe
from distiller.thinning import trial as trial_module
from distiller.thinning.trial import measured_change, model_groups, removable_groups


def reasons(model, x):
    return {group.name: group.reason for group in removable_groups(model, x, "the test")}


class Perceptron(nn.Module):
    """fc1 - fc2 - fc3 - fc4, with something between."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.fc4(self.between(self.fc3(self.fc2(self.fc1(x)).relu())))

    def between(self, x):
        return x.relu()


def test_all_is_well_with_a_plain_model(tiny_cnn):
    x = torch.randn(1, 1, 8, 8)
    assert removable_groups(tiny_cnn, x, "the test") == find_channel_groups(tiny_cnn, x)


def test_code_that_has_the_number_of_channels_in_a_shape_is_told_of_its_group_alone():
    class Reshaping(Perceptron):
        def between(self, x):
            return x.view(len(x), 6).relu()

    x, shape = torch.randn(2, 6), "shape '[2, 6]' is invalid for input of size 10"
    found = reasons(Reshaping(), x)
    assert found["fc3.weight"] == f"the model does not run without it: RuntimeError: {shape}"
    assert [name for name, reason in found.items() if reason is None] == ["fc1.weight", "fc2.weight"]


def test_code_that_has_the_number_of_channels_in_its_arithmetic_is_told():
    class Scaling(Perceptron):
        def between(self, x):
            return x / x.shape[1]

    found = reasons(Scaling(), torch.randn(2, 6))
    assert found["fc1.weight"] is found["fc2.weight"] is None
    assert re.fullmatch(
        "the model's code has the number of its channels in it: without one of them outputs are 0.[0-9]+ of "
        "their scale from those with it at zero",
        str(found["fc3.weight"]),
    )


def test_weights_that_are_all_the_same_do_not_hide_it():
    class Scaling(Perceptron):
        def between(self, x):
            return x / x.shape[1]

    model = Scaling()
    nn.init.zeros_(model.fc4.weight)
    assert reasons(model, torch.randn(2, 6))["fc3.weight"] is not None


def test_several_that_fail_for_different_reasons_are_each_told_their_own():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
            self.norm = Centred(6)

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x).relu()
                if i == 1:
                    x = x.view(len(x), 6)
                if i == 3:
                    x = self.norm(x)
            return x

    class Centred(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) + 1

    found = reasons(Many(), torch.randn(2, 6))
    assert [name for name, reason in found.items() if reason is None] == [
        "layers.0.weight", "layers.2.weight", "layers.4.weight",
    ]  # fmt: skip
    assert str(found["layers.1.weight"]).startswith("the model does not run without it: RuntimeError: shape")
    assert str(found["layers.3.weight"]).startswith("'norm' is a Centred, whose code is its own")


def test_what_only_training_runs_is_tried_too():
    class Auxiliary(Perceptron):
        def between(self, x):
            if self.training:
                x.view(len(x), 6)
            return x.relu()

    assert reasons(Auxiliary(), torch.randn(2, 6))["fc3.weight"] is not None


class Branching(Perceptron):
    """With an auxiliary classifier, which training alone runs."""

    def __init__(self):
        super().__init__()
        self.aux1, self.norm, self.aux2 = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.fc2(self.fc1(x).relu()).relu()
        result = self.fc4(self.fc3(x))
        return (result, self.aux2(self.norm(self.aux1(x)))) if self.training else result


def test_auxiliary_classifiers_become_smaller_with_what_they_read():
    model, x = Branching(), torch.randn(1, 6)
    groups = removable_groups(model, x, "the test")
    assert {("aux1.weight", 1), ("fc3.weight", 1)} <= set(groups["fc2.weight"].indices([0]))
    assert [group.name for group in groups.removable()] == [
        "fc1.weight",
        "fc2.weight",
        "fc3.weight",
        "aux1.weight",
    ]
    assert groups.macs() == 4 * 36  # what training adds is no work of the network
    assert groups.macs({"fc2.weight": [0], "aux1.weight": [0]}) == 4 * 36 - 2 * 6
    apply_recipe(model, thinning_recipe(model, groups, {"fc2.weight": [0], "aux1.weight": [1]}))
    main, aux = model.train()(torch.randn(4, 6))
    assert (main.shape, aux.shape) == ((4, 6), (4, 3))
    assert model.norm.num_features == 4


def test_a_model_that_cannot_be_trained_on_the_input_is_tried_in_evaluation_alone():
    class Untrainable(Perceptron):
        def between(self, x):
            if self.training:
                raise RuntimeError("not here")
            return x.relu()

    assert reasons(Untrainable(), torch.randn(2, 6))["fc3.weight"] is None


def test_a_group_of_a_single_unit_is_tried_by_itself():
    """Where another like it would go too, nothing might be left of a tensor."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.left, self.right = nn.Linear(3, 2), nn.Linear(1, 2), nn.Linear(1, 2)

        def forward(self, x):
            x = self.fc1(x)
            return self.left(x[:, :1]) + self.right(x[:, 1:])

    assert all(reason is not None for reason in reasons(Pair(), torch.randn(2, 3)).values())


def test_the_model_and_random_numbers_stay_as_they_were(tiny_cnn):
    tiny_cnn.train()
    tiny_cnn.pool.eval()
    before, state = copy.deepcopy(tiny_cnn.state_dict()), torch.get_rng_state()
    modes = [module.training for module in tiny_cnn.modules()]
    model_groups(tiny_cnn, "the test")
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())
    assert [module.training for module in tiny_cnn.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(tiny_cnn, "thinning_recipes")


def test_groups_are_kept_until_shapes_change(tiny_cnn, monkeypatch):
    calls = []
    original = trial_module.removable_groups
    monkeypatch.setattr(trial_module, "removable_groups", lambda *args: calls.append(args) or original(*args))
    first = model_groups(tiny_cnn, "the test")
    assert model_groups(nn.DataParallel(tiny_cnn), "the test") is first
    apply_recipe(tiny_cnn, thinning_recipe(tiny_cnn, first, {"conv1.weight": [0]}))
    second = model_groups(tiny_cnn, "the test")
    assert second["conv1.weight"].size == first["conv1.weight"].size - 1
    assert len(calls) == 2


def test_a_model_that_does_not_say_what_its_input_is_like_is_refused(tiny_cnn):
    del tiny_cnn.input_shape
    message = "'the test' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
    with pytest.raises(DistillerError, match=f"^{re.escape(message)}$"):
        model_groups(tiny_cnn, "the test")


class Returning(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.values if len(self.values) != 1 else self.values[0]


NAN = float("nan")


@pytest.mark.parametrize(
    "masked, thinned, change",
    [
        ([[4.0, -8.0]], [[4.0, -8.0]], 0.0),
        ([[4.0, -8.0]], [[5.0, -8.0]], 1 / 8),
        ([[4.0, -8.0], [1.0, 0.5]], [[4.0, -7.0], [0.5, 0.5]], 1 / 2),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[0.0, 0.0]], [[0.0, 1e-9]], float("inf")),
        ([[NAN, 2.0]], [[NAN, 1.0]], 1 / 2),
        ([[NAN, 2.0]], [[1.0, 2.0]], float("inf")),
        ([[1.0, 2.0]], [[1.0, NAN]], float("inf")),
        ([[1.0, 2.0]], [[1.0]], float("inf")),
        ([[1.0], [2.0]], [[1.0]], float("inf")),
    ],
)
def test_the_change_is_relative_to_the_scale_of_each_output(masked, thinned, change):
    models = [Returning(*map(torch.tensor, values)) for values in (masked, thinned)]
    assert measured_change(*models, torch.zeros(1)) == pytest.approx(change)


def test_a_model_without_tensors_in_what_it_returns_cannot_be_compared():
    with pytest.raises(UsageError, match="^Returning: returns no tensor, so nothing can be compared$"):
        measured_change(Returning(3), Returning(3), torch.zeros(1))
