"""The graphs of one member of each classification family of torchvision."""

from __future__ import annotations

import pytest
import torch

from distiller.graph import SummaryGraph
from distiller.graph_picture import create_dot_graph
from distiller.macs import count_macs
from distiller.models import create_model
from tests.test_graph_picture import edges_of
from tests.test_graph_questions import transformer_macs

FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t"),
    *("vgg11_bn", "vit_b_32", "wide_resnet50_2"),
]
TRAINED_WITH = {"googlenet": ("aux",), "inception_v3": ("AuxLogits",)}
"""What of a model is not there in evaluation."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_graph_answers_for_every_family(arch):
    model = create_model(False, "imagenet", arch, parallel=False)
    images = torch.zeros(model.input_shape)
    graph = SummaryGraph(model, images)
    at = {name: number for number, name in enumerate(graph.ops)}
    for name in graph.ops:
        assert all(
            at[read] < at[name] and name in graph.successors(read) for read in graph.predecessors(name)
        )
        assert all(name in graph.predecessors(reader) for reader in graph.successors(name))
    assert [op.name for op in graph.ops.values() if op.is_output] == [list(graph.ops)[-1]]
    unread = {name for name, _ in model.named_parameters()} - set(graph.params)
    assert all(name.startswith(TRAINED_WITH.get(arch, ())) for name in unread)
    assert sum(graph.get_attr("MACs")) == sum(cost.macs for cost in count_macs(model, images)) > 0
    assert set(graph.predecessors_f(list(graph.ops)[-1], ("Conv", "Gemm"))) <= set(graph.ops)
    assert edges_of(create_dot_graph(graph))


@pytest.mark.slow
def test_the_macs_of_vit_b_16_agree_with_their_closed_form():
    model = create_model(False, "imagenet", "vit_b_16", parallel=False)
    graph = SummaryGraph(model, torch.zeros(1, 3, 224, 224))
    assert sum(graph.get_attr("MACs")) == transformer_macs(224, 16, 12, 768, 3072, 1000) == 17_563_828_224
