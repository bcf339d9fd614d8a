"""Running a network in part gives what running it as a whole gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.errors import GraphTraceError
from distiller.names import named_buffers, named_parameters
from distiller.replay import Rerun, Variant, applied, clean_pass, folded_norms, read_program
from tests.replay.networks import NETWORKS, images, make, program_of


def state_of(model):
    return {
        name: value.detach()
        for name, value in (*dict(named_parameters(model)).items(), *named_buffers(model))
    }


def rerun(model, program, names, changes, x, *, inputs=(), folds=(), at_once=1, in_parts=False):
    together = at_once if callable(at_once) else lambda step: at_once
    part = Rerun(program, names, inputs, folds)
    found, dense = [], None
    for at, value in clean_pass(program, state_of(model), x, [part]):
        if at == 0:
            found = list(part.outputs(value, changes, len(x), together, in_parts=in_parts))
        else:
            dense = value(program.output)
    return found, dense


def expected(model, variant, x):
    with applied(model, variant), torch.no_grad():
        return model(x)


def variants(model, name, levels=(0.3, 0.5, 0.6, 0.8, 0.9)):
    """The parameter with shares of its elements, of the smallest, zero."""
    weight = dict(named_parameters(model))[name].detach()
    found = []
    for level in levels:
        threshold = weight.abs().flatten().quantile(level)
        found.append({name: weight.where(weight.abs() > threshold, torch.zeros(()))})
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_clean_pass_is_the_network(name):
    model, x = make(name), images()
    program = program_of(name, 7)
    ((at, value),) = clean_pass(program, state_of(model), x, [])
    with torch.no_grad():
        assert at == -1
        torch.testing.assert_close(value(program.output), model(x), rtol=1e-5, atol=1e-6)


def more_and_more(step):
    """Changes that are run together: 1, 2 or 3, the later a layer comes."""
    return 1 + step.index % 3


@pytest.mark.parametrize("at_once", [1, 2, 5, more_and_more])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_changed_gives_what_the_changed_network_gives(name, at_once):
    model, x = make(name), images()
    program = program_of(name, 7)
    for parameter, _ in named_parameters(model):
        changed = variants(model, parameter)
        found, dense = rerun(
            model, program, [parameter], [Variant(c, {}) for c in changed], x, at_once=at_once
        )
        for tensors, logits in zip(changed, found, strict=True):
            torch.testing.assert_close(logits, expected(model, Variant(tensors), x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dense, expected(model, Variant({}), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Plain", "Residual", "Branches"])
def test_a_part_is_the_network_bit_for_bit(name):
    model, x = make(name), images()
    program = program_of(name)
    for parameter, value in named_parameters(model):
        if value.dim() == 4:
            changed = variants(model, parameter)
            found, _ = rerun(model, program, [parameter], [Variant(c, {}) for c in changed], x)
            for tensors, logits in zip(changed, found, strict=True):
                assert torch.equal(logits, expected(model, Variant(tensors), x))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["Plain", "Residual", "Branches", "Tied", "Attention"])
def test_filters_and_channels_that_are_zero_give_what_the_network_without_them_gives(name, dim):
    model, x = make(name), images()
    program = program_of(name, 7)
    for parameter, weight in named_parameters(model):
        if weight.dim() < 2:
            continue
        ranks = weight.detach().abs().movedim(dim, 0).flatten(1).mean(1).argsort()
        changed = []
        for count in (0, 1, len(ranks) // 2, len(ranks) // 2, len(ranks)):
            pruned = weight.detach().clone()
            pruned.index_fill_(dim, ranks[:count], 0.0)
            changed.append({parameter: pruned})
        for order in (changed, changed[::-1]):
            found, _ = rerun(
                model, program, [parameter], [Variant(c, {}) for c in order], x, at_once=2, in_parts=True
            )
            for tensors, logits in zip(order, found, strict=True):
                torch.testing.assert_close(logits, expected(model, Variant(tensors), x), rtol=1e-4, atol=1e-5)


def test_zero_filters_are_exact_bit_for_bit():
    model, x = make("Residual"), images()
    program = program_of("Residual")
    weight = model.conv2.weight.detach().clone()
    weight[[1, 4]] = 0
    (found,), _ = rerun(model, program, ["conv2.weight"], [Variant({"conv2.weight": weight}, {})], x)
    assert torch.equal(found, expected(model, Variant({"conv2.weight": weight}), x))


def test_zero_filters_cost_no_run_of_their_layer(monkeypatch):
    model, x = make("Residual"), images()
    program = program_of("Residual")
    weight = model.conv2.weight.detach().clone()
    weight[[1, 4]] = 0
    part = Rerun(program, ["conv2.weight"])
    calls = []
    for at, value in clean_pass(program, state_of(model), x, [part]):
        if at == 0:
            monkeypatch.setattr(
                "distiller.replay.layer_outputs.LayerCall.run", lambda self, w, **kw: calls.append(1)
            )
            list(part.outputs(value, [Variant({"conv2.weight": weight}, {})], len(x)))
    assert calls == []


def test_only_what_depends_on_the_change_is_run():
    program = program_of("Residual")
    part = Rerun(program, ["short.0.weight"])
    assert {step.module for step in part.steps if step.kind == "conv2d"} == {"short.0"}
    assert [step.kind for step in Rerun(program, ["fc.weight"]).steps] == ["linear"]
    assert Rerun(program, ["norm2.num_batches_tracked"]).steps == ()


def test_several_parameters_and_buffers_change_together():
    model, x = make("Residual"), images()
    program = program_of("Residual")
    tensors = {
        "conv1.weight": model.conv1.weight.detach() * 0.5,
        "norm1.bias": model.norm1.bias.detach() + 1,
        "norm1.running_var": model.norm1.running_var * 2,
    }
    found, _ = rerun(model, program, list(tensors), [Variant(tensors, {})], x, at_once=3)
    torch.testing.assert_close(found[0], expected(model, Variant(tensors), x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["stem", "conv1", "conv2", "short.0", "fc"])
def test_a_changed_input_changes_that_layer_alone(layer):
    model, x = make("Residual"), images()
    program = program_of("Residual")
    inputs = {layer: lambda value: torch.round(value * 4) / 4}
    found, _ = rerun(model, program, [], [Variant({}, inputs)] * 3, x, inputs=[layer], at_once=2)
    for logits in found:
        assert torch.equal(logits, expected(model, Variant({}, inputs), x))


@pytest.mark.parametrize("layer, count", [("norm", 0), ("missing", 0)])
def test_an_input_of_what_is_no_layer_is_refused(layer, count):
    program = program_of("Residual")
    with pytest.raises(GraphTraceError) as raised:
        Rerun(program, [], [layer])
    assert str(raised.value) == (
        f"'{layer}' is {count} convolutions or linear layers, one that is run once expected"
    )


def test_an_input_of_a_layer_that_is_run_twice_is_refused():
    program = program_of("Tied")
    with pytest.raises(
        GraphTraceError, match="'again' is 2 convolutions or linear layers, one that is run once"
    ):
        Rerun(program, [], ["again"])


def test_nothing_that_is_given_is_written_over():
    model, x = make("Plain"), images()
    program = program_of("Plain")
    kept, before = x.clone(), copy.deepcopy(model.state_dict())
    weight = model.conv1.weight.detach() * 2
    changes = [Variant({"conv1.weight": weight}, {})] * 2
    first, _ = rerun(model, program, ["conv1.weight"], changes, x)
    assert torch.equal(first[0], first[1])
    assert torch.equal(x, kept)
    assert torch.equal(weight, model.conv1.weight.detach() * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_are_folded_where_a_convolution_feeds_them_alone():
    model = make("Residual")
    program = program_of("Residual")
    folds = folded_norms(program, state_of(model))
    assert len(folds) == 4
    assert {fold.step.module for fold in folds} == {"stem", "conv1", "conv2", "short.0"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_folded_norms_give_the_same_within_rounding(channels_last):
    model, x = make("Residual"), images()
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    program = program_of("Residual")
    folds = folded_norms(program, state_of(model))
    for parameter, _ in named_parameters(model):
        changed = variants(model, parameter)
        found, _ = rerun(
            model, program, [parameter], [Variant(c, {}) for c in changed], x, folds=folds, at_once=2
        )
        for tensors, logits in zip(changed, found, strict=True):
            torch.testing.assert_close(logits, expected(model, Variant(tensors), x), rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_changed_is_not_folded():
    model = make("Residual")
    program = program_of("Residual")
    folds = folded_norms(program, state_of(model))
    kinds = [step.kind for step in Rerun(program, ["norm1.weight"], (), folds).steps]
    assert kinds.count("_native_batch_norm_legit_no_training") == 1  # its own; that of conv2 is folded


@pytest.mark.parametrize("name, batch", [("Plain", None), ("Residual", None), ("FixedBatch", 3)])
def test_the_number_of_images_is_open_where_the_network_allows_it(name, batch):
    assert program_of(name).batch == batch


def test_results_are_kept_no_longer_than_they_are_needed():
    model, x = make("Plain"), images()
    program = program_of("Plain")
    part = Rerun(program, ["fc2.weight"])
    for at, value in clean_pass(program, state_of(model), x, [part]):
        if at == 0:
            first = next(step.index for step in program.steps if step.module == "conv1")
            with pytest.raises(KeyError):
                value(first)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x.flatten(1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)), x.mean()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)) if x.sum() > 0 else self.fc(-x.flatten(1))


@pytest.mark.parametrize(
    "network, reason",
    [
        (
            Counting,
            "Counting: changes its own buffers in evaluation, which are put back each time; it is run as a whole instead",
        ),
        (Two, "Two: takes 1 tensors and returns 2 values, one of each can be run in part"),
        (Branching, "Branching: torch.export cannot trace it for running it in part: "),
    ],
)
def test_what_cannot_be_run_in_part_says_why(network, reason):
    with pytest.raises(GraphTraceError) as raised:
        read_program(network().eval(), images(3))
    assert str(raised.value).startswith(reason)
