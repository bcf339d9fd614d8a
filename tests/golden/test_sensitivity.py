"""The file of a sensitivity sweep."""

from __future__ import annotations

import torch

from distiller.sensitivity import AxisRequest, TensorBlocks, sensitivity_sweep


def test_the_curves_of_a_fixed_network(golden, fixed_net, fixed_images, tmp_path):
    with torch.no_grad():
        labels = fixed_net(fixed_images).argmax(1)
    data = TensorBlocks(fixed_images, labels, 16, "fixed")
    axes = [AxisRequest("element", (0.5, 0.9)), AxisRequest("weight-bits", (4.0, 2.0))]
    sensitivity_sweep(fixed_net, axes, data, tmp_path)
    golden("sensitivity.csv", (tmp_path / "sensitivity.csv").read_text())
