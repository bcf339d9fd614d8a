"""The file of a sensitivity sweep."""

from __future__ import annotations

import torch

from distiller.sensitivity.sweep import sensitivity_sweep


def test_the_curves_of_a_fixed_network(golden, fixed_net, fixed_images, tmp_path):
    def score(model):
        with torch.no_grad():
            logits = model(fixed_images)
        right = logits.topk(2).indices == labels.view(-1, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        return 100 * right[:, 0].float().mean().item(), 100 * right.any(1).float().mean().item(), loss

    with torch.no_grad():
        labels = fixed_net(fixed_images).argmax(1)
    sensitivity_sweep(fixed_net, "element", [0.0, 0.5, 0.9], score, tmp_path, len(fixed_images))
    golden("sensitivity.csv", (tmp_path / "sensitivity.csv").read_text())
