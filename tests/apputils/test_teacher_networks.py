from __future__ import annotations

import pytest
import torch

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.teacher_networks import check_teacher, load_teacher
from distiller.channel_groups import find_channel_groups
from distiller.distillation import Teachers
from distiller.errors import CheckpointError, DistillerError, UsageError
from distiller.factorization import factorize
from distiller.models import create_model
from distiller.quantization import DorefaQuantizer
from distiller.scheduler import CompressionScheduler
from distiller.thinning import apply_recipe, thinning_recipe
from tests.conftest import TinyCnn

IMAGES = torch.randn(3, 1, 28, 28)


def network(arch="lenet5", dataset="digits", **options):
    return create_model(False, dataset, arch, parallel=False, **options)


@pytest.fixture
def student():
    return network("lenet_300_100")


@pytest.fixture
def saved(tmp_path):
    """`saved(model)`: a checkpoint of it."""
    return lambda model, arch="lenet5", **more: str(save_checkpoint(0, arch, model, dir=tmp_path, **more))


def answers(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def test_a_teacher_comes_with_the_weights_of_its_checkpoint(student, saved):
    trained = network()
    path = saved(trained)
    teacher = load_teacher({"arch": "lenet5", "checkpoint": path, "weight": 2}, student)
    assert torch.equal(answers(teacher.model), answers(trained))
    assert (teacher.weight, teacher.told) == (2.0, f"teacher 'lenet5' of {path}")
    assert (teacher.macs, teacher.is_quantized) == (2_293_000, False)
    assert torch.equal(answers(load_teacher({"checkpoint": path}, student).model), answers(trained))


def test_loading_a_teacher_draws_no_random_numbers_and_leaves_the_student_alone(student, saved):
    path = saved(network())
    student.train()
    before = torch.get_rng_state()
    load_teacher({"checkpoint": path}, student)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert all(param.requires_grad for param in student.parameters())


def test_a_teacher_may_be_thinned(student, saved):
    thin = network()
    groups = find_channel_groups(thin, torch.zeros(thin.input_shape))
    recipe = thinning_recipe(thin, groups, {"conv1.weight": [0, 1, 2]})
    apply_recipe(thin, recipe, None, None, [])
    thin.thinning_recipes = [recipe.to_plain()]
    teacher = load_teacher({"checkpoint": saved(thin)}, student)
    assert teacher.model.conv1.weight.shape[0] == thin.conv1.weight.shape[0] == 17
    assert torch.equal(answers(teacher.model), answers(thin))


def test_a_teacher_may_be_factored(student, saved):
    factored = network()
    factorize(factored, {"fc1": {"rank": 4}})
    teacher = load_teacher({"checkpoint": saved(factored)}, student)
    assert teacher.model.fc1.first.weight.shape == (4, 800)
    assert torch.equal(answers(teacher.model), answers(factored))
    assert teacher.macs == 2_293_000 - 400_000 + 4 * (800 + 500)


def test_a_teacher_may_be_quantized(student, saved):
    quantized = network()
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    quantizer = DorefaQuantizer(quantized, optimizer, bits_activations=8, bits_weights=4)
    quantizer.prepare_model()
    quantizer.quantize_params()
    teacher = load_teacher({"checkpoint": saved(quantized)}, student)
    assert teacher.is_quantized
    assert torch.allclose(answers(teacher.model), answers(quantized), atol=1e-6)


def test_a_teacher_answers_any_student_of_its_images(saved):
    """A student that `create_model` did not make says what it needs."""
    plain = TinyCnn()
    plain.input_shape = (1, 1, 28, 28)
    path = saved(network(num_classes=4))
    assert load_teacher({"checkpoint": path}, plain).model.fc2.weight.shape[0] == 4
    plain.dataset = "mine:four"  # what a function of the user's gives may be the same images without labels
    assert load_teacher({"checkpoint": path}, plain).model.fc2.weight.shape[0] == 4
    del plain.input_shape
    with pytest.raises(UsageError) as error:
        load_teacher({"checkpoint": path}, plain)
    assert str(error.value) == (
        "distillation: the shape of the student's images is not known; create the student by create_model, or set "
        "its input_shape"
    )


def test_a_teacher_of_other_data_is_refused(student, saved):
    path = saved(network(dataset="fashion-mnist"))
    with pytest.raises(CheckpointError) as error:
        load_teacher({"checkpoint": path}, student)
    assert str(error.value) == (
        f"teacher 'lenet5' of {path}: is of data set 'fashion-mnist', the student learns 'digits'; "
        "give a teacher of the same data"
    )


def test_a_teacher_of_other_classes_is_refused(student, saved):
    with pytest.raises(CheckpointError, match="is of another model|other sizes"):
        load_teacher({"checkpoint": saved(network(num_classes=7))}, student)


def test_a_teacher_of_another_architecture_than_its_checkpoint(student, saved):
    path = saved(network())
    with pytest.raises(CheckpointError) as error:
        load_teacher({"arch": "lenet_300_100", "checkpoint": path}, student)
    assert str(error.value) == (
        f"{path}: is of another model: the checkpoint is of 'lenet5', the model is 'lenet_300_100'; "
        "create the model as 'lenet5'"
    )


def test_torchvisions_weights_are_of_imagenet(student):
    with pytest.raises(UsageError) as error:
        load_teacher({"arch": "resnet18", "pretrained": True}, student)
    assert str(error.value) == (
        "teacher 'resnet18': torchvision's weights answer with the 1,000 classes of ImageNet, the student with "
        "10; give a checkpoint of a network trained on the student's data"
    )


def test_a_teacher_for_images_of_another_size(tmp_path):
    student = network("resnet20_cifar", "cifar10")
    teacher = network("resnet18", "cifar10")
    if tuple(teacher.input_shape) == tuple(student.input_shape):
        teacher = network("inception_v3", "cifar10")
    path = str(save_checkpoint(0, teacher.arch, teacher, dir=tmp_path))
    with pytest.raises(
        UsageError, match=r"takes images of shape \(3, \d+, \d+\), the student's are \(3, 32, 32\)"
    ):
        load_teacher({"checkpoint": path}, student)


def test_a_teacher_that_has_diverged(student, saved):
    broken = network()
    with torch.no_grad():
        broken.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="fc1.weight holds 1 NaN; give a checkpoint from before"):
        load_teacher({"checkpoint": saved(broken)}, student)


def test_masks_of_the_teachers_training_do_not_matter(student, saved):
    trained = network()
    path = saved(trained, scheduler=CompressionScheduler(trained))
    assert torch.equal(
        Teachers([load_teacher({"checkpoint": path}, student)]).answers(IMAGES)[:, 0], answers(trained)
    )


@pytest.mark.parametrize(
    "source, told",
    [
        ({"arc": "x", "pretrained": True}, "'arc' is unknown to a teacher; did you mean 'arch'?"),
        ({"zz": 1}, "'zz' is unknown to a teacher; it takes arch, checkpoint, pretrained, weight"),
        ({"arch": 3}, "'arch' of a teacher must be text, got 3"),
        ({"checkpoint": ""}, "'checkpoint' of a teacher must be text, got ''"),
        ({"pretrained": 1}, "'pretrained' of a teacher must be true or false, got 1"),
        ({"checkpoint": "c", "weight": 0}, "'weight' of a teacher must be a number more than 0, got 0"),
        ({"checkpoint": "c", "weight": True}, "'weight' of a teacher must be a number more than 0, got True"),
        ({"arch": "x"}, "a teacher needs its weights: give one of 'checkpoint' and 'pretrained'"),
        (
            {"checkpoint": "c", "pretrained": True},
            "a teacher needs its weights: give one of 'checkpoint' and 'pretrained'",
        ),
        ({"pretrained": True}, "a teacher with torchvision's weights needs its 'arch'"),
    ],
)
def test_what_names_no_teacher(source, told):
    with pytest.raises(DistillerError) as error:
        check_teacher(source)
    assert str(error.value) == told
