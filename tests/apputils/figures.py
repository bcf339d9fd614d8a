"""Figures of a dense and a compressed model, made up."""

from __future__ import annotations

from dataclasses import replace

from distiller.apputils.measurement import Measurement
from distiller.export.latency import Latency


def latency(milliseconds: float, batch_size: int = 1, threads: int = 2) -> Latency:
    return Latency(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3, 10, batch_size, threads, "cpu")


DENSE = Measurement(
    top1_correct=9200,
    top5_correct=9990,
    n=10000,
    loss=0.25,
    parameters=100_000,
    nonzeros=100_000,
    weight_sparsity=0.0,
    total_sparsity=0.0,
    macs=1_000_000,
    bytes_checkpoint=402_000,
    bytes_dense=400_000,
    bytes_sparse=400_000,
    bytes_quantized=None,
    latency_single=latency(1.0),
    latency_batch=latency(20.0, batch_size=256),
)
PRUNED = replace(
    DENSE,
    top1_correct=9150,
    nonzeros=20_000,
    weight_sparsity=0.8123,
    total_sparsity=0.8,
    bytes_sparse=100_000,
    bytes_quantized=100_005,
    latency_single=latency(1.25),
)
