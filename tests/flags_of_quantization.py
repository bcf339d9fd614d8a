"""The flags of quantization after training: (spellings, value, destination, parsed value, default)."""

from __future__ import annotations

SWITCH = None
ACCEPTED = [
    (["--quantize-eval", "--qe"], SWITCH, "quantize_eval", True, False),
    (["--qe-mode", "--qem"], "ASYM_S", "qe_mode", "asym_s", "sym"),
    (["--qe-mode-acts", "--qema"], "Asym_U", "qe_mode_acts", "asym_u", None),
    (["--qe-mode-wts", "--qemw"], "SYM_restr", "qe_mode_wts", "sym_restr", None),
    (["--qe-bits-acts", "--qeba"], "0", "qe_bits_acts", 0, 8),
    (["--qe-bits-wts", "--qebw"], "4", "qe_bits_wts", 4, 8),
    (["--qe-bits-accum"], "16", "qe_bits_accum", 16, 32),
    (["--qe-clip-acts", "--qeca"], "Laplace", "qe_clip_acts", "laplace", "none"),
    (["--qe-clip-n-stds"], "2.5", "qe_clip_n_stds", 2.5, None),
    (["--qe-no-clip-layers", "--qencl"], "conv1", "qe_no_clip_layers", ["conv1"], []),
    (["--qe-no-quant-layers", "--qenql"], "conv1", "qe_no_quant_layers", ["conv1"], []),
    (["--qe-per-channel", "--qepc"], SWITCH, "qe_per_channel", True, False),
    (["--qe-scale-approx-bits", "--qesab"], "8", "qe_scale_approx_bits", 8, None),
    (["--qe-save-fp-weights"], SWITCH, "qe_save_fp_weights", True, False),
    (["--qe-stats-file"], "s.yaml", "qe_stats_file", "s.yaml", None),
    (["--qe-dynamic"], SWITCH, "qe_dynamic", True, False),
    (["--qe-calibration"], "0.2", "qe_calibration", 0.2, None),
    (["--qe-config-file"], "q.yaml", "qe_config_file", "q.yaml", None),
    (["--qe-convert-pytorch", "--qept"], SWITCH, "qe_convert_pytorch", True, False),
    (["--qe-pytorch-backend"], "QNNPACK", "qe_pytorch_backend", "qnnpack", "fbgemm"),
    (["--activation-histograms", "--act-hist"], "0.1", "activation_histograms", 0.1, None),
    (["--qe-lapq", "--qe-coordinate-search"], SWITCH, "qe_lapq", True, False),
    (["--lapq-maxiter"], "2", "lapq_maxiter", 2, None),
    (["--lapq-maxfev"], "9", "lapq_maxfev", 9, None),
    (["--lapq-method"], "COBYLA", "lapq_method", "COBYLA", "Powell"),
    (["--lapq-basinhopping", "--lapq-bh"], SWITCH, "lapq_basinhopping", True, False),
    # A defect of Distiller: it had no type here, and a number that was given stayed text.
    (["--lapq-basinhopping-niter", "--lapq-bh-niter"], "7", "lapq_basinhopping_niter", 7, 100),
    (["--lapq-init-mode"], "l2", "lapq_init_mode", "L2", "NONE"),
    (["--lapq-init-method"], "quadratic", "lapq_init_method", "quadratic", None),
    (["--lapq-eval-memoize-dataloader"], SWITCH, "lapq_eval_memoize_dataloader", True, False),
    (["--lapq-search-clipping"], SWITCH, "lapq_search_clipping", True, False),
    (["--qe-search-size", "--lapq-eval-size"], "0.2", "qe_search_size", 0.2, None),
]
"""Those of Distiller."""
ADDED = [
    (["--qe-fpq"], "BF16", "qe_fpq", "bf16", None),
    (["--qe-one-pass"], SWITCH, "qe_one_pass", True, False),
    (["--qe-equalize", "--qe-cle"], SWITCH, "qe_equalize", True, False),
    (["--qe-equalize-relu6"], SWITCH, "qe_equalize_relu6", True, False),
    (["--qe-absorb-bias"], SWITCH, "qe_absorb_bias", True, False),
    (["--qe-mixed-precision"], "5.5", "qe_mixed_precision", 5.5, None),
    (["--qe-mixed-precision-bytes"], "1000", "qe_mixed_precision_bytes", 1000.0, None),
    (["--qe-mixed-precision-bitops"], "1e9", "qe_mixed_precision_bitops", 1e9, None),
    (["--qe-clip-search"], SWITCH, "qe_clip_search", True, False),
    (["--qe-mse-scales"], SWITCH, "qe_mse_scales", True, False),
    (["--qe-adaround"], SWITCH, "qe_adaround", True, False),
    (["--qe-adaround-iterations"], "500", "qe_adaround_iterations", 500, 2000),
    (["--qe-bias-correction"], SWITCH, "qe_bias_correction", True, False),
    (["--qe-resume"], "logs/x", "qe_resume", "logs/x", None),
    (["--export-int8"], "x.onnx", "export_int8", "x.onnx", None),
    (["--qe-report"], SWITCH, "qe_report", True, False),
]
