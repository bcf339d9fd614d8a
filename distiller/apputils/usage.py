"""Flags of the program that contradict each other, or that the job they ask for has no use for.

Such a flag is refused by name, never ignored; but those that users have in every command line
(--lr, --epochs, -p, ...) are welcome in every job.
Knows nothing about how flags are parsed, nor about what the jobs do.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

from distiller.apputils.distillation_usage import distillation_rules
from distiller.apputils.early_exit_usage import early_exit_rules
from distiller.apputils.given_flags import given_flags
from distiller.apputils.layerwise_usage import layerwise_rules
from distiller.apputils.packing_usage import packing_rules, packs_only
from distiller.apputils.quantization_usage import flag_of, ignored_beside_a_file, quantization_rules
from distiller.apputils.recommend_usage import recommend_rules
from distiller.errors import UsageError

_ONLY_WHEN_TRAINING = {
    "num_best_scores": "--num-best-scores",
    "masks_sparsity": "--masks-sparsity",
    "log_params_histograms": "--param-hist",
    "save_untrained_model": "--save-untrained-model",
}

_EMBEDDED = ("digits", "synthetic")


def check_usage(args: Namespace) -> list[str]:
    """Refuse flags that cannot be together, and flags without effect.

    Args:
        args: the flags by name; which of them were given, `given_flags` says.

    Returns:
        What to warn of.

    Raises:
        UsageError: naming the first such flag.
    """
    given = given_flags(args)
    for is_wrong, message in _rules(args, given):
        if is_wrong:
            raise UsageError(message)
    settings = ignored_beside_a_file(given)
    if args.qe_config_file and settings:
        return [f"--qe-config-file: the file says it all, ignored are {', '.join(settings)}"]
    return []


def _rules(args: Namespace, given: Set[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then."""
    jobs = _jobs(args)
    yield args.compress is False, "--compress: needs a FILE"
    yield args.dry_run and not args.compress, "--dry-run: needs a schedule, given with --compress"
    yield (
        bool(args.reset_optimizer and not args.resumed_checkpoint_path),
        "--reset-optimizer: goes with --resume-from",
    )
    yield (
        bool(args.pretrained and (args.resumed_checkpoint_path or args.load_model_path)),
        "--pretrained: not together with --resume-from or --exp-load-weights-from",
    )
    yield bool(args.device and (args.cpu or args.gpus)), "--device: not together with --cpu or --gpus"

    yield (
        jobs == ["--qe-calibration", "--evaluate"],
        "--qe-calibration: with --evaluate only for --quantize-eval; leave --evaluate out to collect alone",
    )
    yield len(jobs) > 1, f"{' and '.join(jobs[:2])}: are two jobs; give each a command line of its own"
    yield from quantization_rules(args, given)
    yield from packing_rules(args, jobs)
    yield from layerwise_rules(args, given)
    yield from recommend_rules(args, given)
    yield from distillation_rules(args, given, jobs)
    yield from early_exit_rules(args, given, jobs)

    yield bool(args.optimizer != "sgd" and "momentum" in given), "--momentum: of --optimizer sgd only"
    if args.dataset in _EMBEDDED:
        yield bool(args.data), f"{args.dataset} needs no DATASET_DIR; {args.data} is not read, leave it out"
        yield args.download, f"--download: {args.dataset} is there without, leave it out"
    yield args.greedy and args.greedy_target_density is None, "--greedy: needs --greedy-target-density D"
    yield bool(args.greedy and args.compress), "--compress: not together with --greedy, which has no schedule"
    for name in sorted(given):
        if name.startswith("greedy_"):
            yield not args.greedy, f"{flag_of(name)}: goes with --greedy"

    yield (
        bool(args.thinnify and not (args.resumed_checkpoint_path or args.load_model_path)),
        "--thinnify: needs a checkpoint, given with --resume-from or --exp-load-weights-from",
    )
    for name in sorted(given):
        if name.startswith("sense_"):
            yield not args.sensitivity, f"{flag_of(name)}: goes with --sense"
    yield (
        args.display_confusion and jobs not in ([], ["--evaluate"]),
        "--confusion: only when training or evaluating",
    )
    for name, flag in _ONLY_WHEN_TRAINING.items():
        yield name in given and bool(jobs), f"{flag}: only when training"
    yield (
        bool(args.activation_stats) and jobs not in ([], ["--evaluate"]),
        "--activation-stats: only when training or evaluating",
    )
    yield (
        bool(args.activation_stats and args.quantize_eval),
        "--activation-stats: not with --quantize-eval, quantized layers have their ReLU inside",
    )
    for phase in args.activation_stats:
        yield phase != "test" and bool(jobs), f"--activation-stats {phase}: only when training"
    yield bool(args.plugin and not args.compress), "--plugin: goes with --compress"
    for package in args.plugin:
        first = package.partition(".")[0]
        yield (
            not package.isidentifier(),
            f"--plugin: must be the name of a package, got '{package}'"
            + (f"; give --plugin {first}" if first.isidentifier() else ""),
        )


def _jobs(args: Namespace) -> list[str]:
    """The flags of the jobs other than training that are asked for."""
    flags = {
        "--summary": bool(args.summary),
        "--dry-run": args.dry_run,
        "--greedy": args.greedy,
        "--export-onnx": bool(args.export_onnx),
        "--activation-histograms": args.activation_histograms is not None,
        "--sense": bool(args.sensitivity),
        "--recommend": bool(args.recommend),
        "--layerwise": bool(args.layerwise),
        "--layerwise-plot": bool(args.layerwise_plot),
        "--plot-mixture": bool(args.plot_mixture),
        "--qe-calibration": args.qe_calibration is not None and not args.quantize_eval,
        "--evaluate": args.evaluate,
        "--export-int8": bool(args.export_int8) and not args.evaluate,
        "--thinnify": args.thinnify,
        "--pack": packs_only(args),
        "--unpack": bool(args.unpack),
    }
    return [flag for flag, is_given in flags.items() if is_given]
