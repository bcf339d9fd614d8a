"""The file of activation statistics, from its first line to its last."""

from __future__ import annotations

import torch

from distiller.data_loggers.quant_stats import STATS_FILE, collect_quant_stats


def test_the_statistics_of_a_fixed_network_on_fixed_images(golden, fixed_net, fixed_images, tmp_path):
    def run(model):
        with torch.no_grad():
            for batch in fixed_images.split(10):
                model(batch)

    collect_quant_stats(fixed_net, run, save_dir=tmp_path)
    golden("acts_quantization_stats.yaml", (tmp_path / STATS_FILE).read_text())
