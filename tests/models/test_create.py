import textwrap

import pytest
import torch
from torch import nn

from distiller.errors import UnknownNameError, UsageError
from distiller.models import (
    ALL_MODEL_NAMES,
    all_model_names,
    create_model,
    find_spec,
    input_shape_for,
    register_user_model,
)
from distiller.registry import MODELS


@pytest.fixture
def forget_registered(monkeypatch):
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    package = tmp_path / "some_users_nets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def plain():
                return nn.Flatten()

            def linear(num_classes, in_channels):
                return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes), nn.Linear(num_classes, in_channels))

            def wrong():
                return 42

            def leaving():
                raise SystemExit(0)
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_the_model_says_what_it_is():
    model = create_model(False, "cifar10", "resnet20_cifar")
    assert (model.arch, model.dataset, model.is_parallel) == ("resnet20_cifar", "cifar10", False)
    assert model.input_shape == (1, 3, 32, 32)


def test_a_model_is_built_for_the_data_in_use():
    model = create_model(False, "fashion-mnist", "resnet20_cifar")
    assert model.conv1.in_channels == 1
    assert model.input_shape == (1, 1, 28, 28)
    assert create_model(False, "cifar100", "resnet20_cifar").fc.out_features == 100


def test_without_data_set_it_is_the_one_the_model_is_designed_for():
    assert create_model(False, None, "lenet5").dataset == "mnist"


def test_what_is_given_goes_before_what_is_known():
    model = create_model(False, "mnist", "resnet20_cifar", num_classes=3, input_shape=(1, 3, 16, 16))
    assert model.fc.out_features == 3
    assert model.input_shape == (1, 3, 16, 16)


def test_data_of_which_nothing_is_known_need_the_number_of_classes():
    with pytest.raises(UsageError) as caught:
        create_model(False, "image-folder", "resnet20_cifar")
    message = "create_model: how many classes 'image-folder' has is not known; give num_classes"
    assert str(caught.value) == message
    model = create_model(False, "image-folder", "resnet20_cifar", num_classes=4)
    assert (model.dataset, model.input_shape) == ("image-folder", (1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 24)])
def test_an_input_shape_is_of_one_square_image(shape):
    with pytest.raises(UsageError, match=r"must be \(1, channels, size, size\) of one square image, got \("):
        create_model(False, "cifar10", "resnet20_cifar", input_shape=shape)


def test_names_are_taken_in_upper_case_too():
    assert create_model(False, "cifar10", "ResNet20_CIFAR").arch == "resnet20_cifar"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet20_cifarr", "arch: unknown architecture 'resnet20_cifarr'; did you mean 'resnet20_cifar'?"),
        ("zzz", "arch: unknown architecture 'zzz'"),
        (
            "zzz.qqq",
            "arch: unknown architecture 'zzz.qqq'; a function of your own is written package.module:function",
        ),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_name(arch, message):
    with pytest.raises(UnknownNameError) as caught:
        create_model(False, "cifar10", arch)
    assert str(caught.value) == message


def test_pretrained_is_refused_where_there_are_no_weights():
    with pytest.raises(UsageError) as caught:
        create_model(True, "cifar10", "resnet20_cifar")
    assert str(caught.value) == (
        "pretrained: no trained weights are offered for 'resnet20_cifar'; "
        "leave it out, or load a checkpoint of your own"
    )


@pytest.mark.parametrize(
    ("parallel", "device_ids", "is_parallel"),
    [(True, None, False), (True, [0], False), (True, [0, 1], True), (False, [0, 1], False)],
)
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch refuses a second GPU that is not there")
def test_only_several_gpus_mean_data_parallel(parallel, device_ids, is_parallel):
    model = create_model(False, "mnist", "lenet_300_100", parallel, device_ids)
    assert isinstance(model, nn.DataParallel) is is_parallel
    assert model.is_parallel is is_parallel
    assert model.input_shape == (1, 1, 28, 28)


@pytest.mark.parametrize(
    ("arch", "channels", "size", "expected"),
    [
        ("resnet20_cifar", 1, 8, (1, 8, 8)),
        ("lenet_300_100", 3, 32, (3, 28, 28)),
        ("simplenet_cifar", 1, 28, (1, 32, 32)),
        ("vgg11_cifar", 1, 28, (1, 32, 32)),
        ("resnet18", 1, 28, (3, 28, 28)),
        ("resnet18", 1, 8, (3, 224, 224)),
        ("alexnet", 3, 32, (3, 224, 224)),
        ("inception_v3", 3, 224, (3, 299, 299)),
        ("vit_b_16", 3, 32, (3, 224, 224)),
    ],
)
def test_images_are_scaled_only_where_they_must(arch, channels, size, expected):
    assert input_shape_for(arch, channels, size) == expected


def test_all_names_are_lower_case_and_found():
    assert all_model_names() == ALL_MODEL_NAMES
    assert {"lenet5", "resnet56_cifar", "vgg19_bn_cifar", "resnet50", "mobilenet_v2"} <= set(ALL_MODEL_NAMES)
    for name in ALL_MODEL_NAMES:
        assert name == name.lower()
        assert find_spec(name).arch == name


@pytest.mark.usefixtures("forget_registered")
def test_a_users_model_is_found_by_its_name():
    register_user_model("MyNet", "fashion-mnist", lambda num_classes: nn.Linear(2, num_classes))
    model = create_model(False, None, "mynet", num_classes=3)
    assert (model.dataset, model.input_shape, model.out_features) == ("fashion-mnist", (1, 1, 28, 28), 3)
    assert "mynet" in all_model_names()


@pytest.mark.usefixtures("forget_registered")
@pytest.mark.parametrize(
    ("arch", "dataset", "message"),
    [
        ("LeNet5", "mnist", "register_model: there is an architecture 'lenet5' already; choose another name"),
        ("ResNet18", "mnist", "register_user_model: torchvision has a model 'resnet18'; choose another name"),
        ("mine", "mnits", "register_user_model: unknown data set 'mnits'; did you mean 'mnist'?"),
    ],
)
def test_a_users_model_needs_a_new_name_and_a_known_data_set(arch, dataset, message):
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        register_user_model(arch, dataset, nn.Flatten)
    assert str(caught.value) == message


@pytest.mark.usefixtures("user_package")
def test_a_dotted_path_is_called_with_what_it_takes():
    model = create_model(False, "fashion-mnist", "some_users_nets.small:linear")
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 1)
    assert model[1].out_features == 10
    assert model.arch == "some_users_nets.small:linear"
    assert isinstance(create_model(False, "mnist", "some_users_nets.small:plain"), nn.Flatten)


@pytest.mark.usefixtures("user_package")
@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        (
            "some_users_nets.small:gone",
            UnknownNameError,
            "architecture 'some_users_nets.small.gone' cannot be imported",
        ),
        ("no_such_package:net", UnknownNameError, "architecture 'no_such_package.net' cannot be imported"),
        (
            "some_users_nets.small:wrong",
            UsageError,
            "arch: 'some_users_nets.small:wrong' must return a torch.nn.Module, got int",
        ),
        (
            "some_users_nets.small:leaving",
            UsageError,
            "arch: 'some_users_nets.small:leaving': failed with SystemExit: 0 (",
        ),
    ],
)
def test_a_dotted_path_that_gives_no_model_is_refused(arch, error, message):
    with pytest.raises(error) as caught:
        create_model(False, "mnist", arch)
    assert message in str(caught.value)


def test_a_model_without_a_name_is_refused():
    with pytest.raises(UsageError) as caught:
        create_model(False, "digits", None)
    assert str(caught.value) == "arch: must be the name of an architecture, got NoneType"
