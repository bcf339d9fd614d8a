"""Flags of the program that contradict each other, or that the job they ask for has no use for.

Such a flag is refused by name, never ignored; but those that users have in every command line
(--lr, --epochs, -p, ...) are welcome in every job.
Knows nothing about how flags are parsed, nor about what the jobs do.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from distiller.errors import UsageError


def check_usage(args: Namespace, defaults: Namespace) -> None:
    """Refuse flags that cannot be together, and flags without effect.

    Args:
        args: the flags by name.
        defaults: the same of an empty command line; tells which flags were given.

    Raises:
        UsageError: naming the first such flag.
    """
    given = {name for name, value in vars(args).items() if value != getattr(defaults, name)}
    for is_wrong, message in _rules(args, given):
        if is_wrong:
            raise UsageError(message)


def _rules(args: Namespace, given: set[str]) -> Iterator[tuple[bool, str]]:
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

    yield args.quantize_eval and not args.evaluate, "--quantize-eval: only with --evaluate"
    yield (
        jobs == ["--qe-calibration", "--evaluate"],
        "--qe-calibration: with --evaluate only for --quantize-eval; leave --evaluate out to collect alone",
    )
    yield len(jobs) > 1, f"{' and '.join(jobs[:2])}: are two jobs; give each a command line of its own"
    for name in sorted(given):
        if name.startswith("qe_") and name != "qe_calibration":
            flag = f"--{name.replace('_', '-')}"
            yield not args.quantize_eval, f"{flag}: only with --evaluate --quantize-eval"
    yield (
        args.qe_clip_acts == "n_std" and args.qe_clip_n_stds is None,
        "--qe-clip-acts n_std: needs --qe-clip-n-stds N",
    )
    yield (
        args.qe_clip_acts != "n_std" and args.qe_clip_n_stds is not None,
        "--qe-clip-n-stds: only with --qe-clip-acts n_std",
    )
    yield (
        args.qe_bits_acts == args.qe_bits_wts == 0 and not args.qe_config_file,
        "--qe-bits-acts 0 --qe-bits-wts 0: nothing would be quantized; give one of them bits",
    )

    yield bool(args.sense_resume and not args.sensitivity), "--sense-resume: goes with --sense"
    yield "sense_range" in given and not args.sensitivity, "--sense-range: goes with --sense"
    yield (
        args.display_confusion and jobs not in ([], ["--evaluate"]),
        "--confusion: only when training or evaluating",
    )
    yield "num_best_scores" in given and bool(jobs), "--num-best-scores: only when training"
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
        "--sense": bool(args.sensitivity),
        "--qe-calibration": args.qe_calibration is not None and not args.quantize_eval,
        "--evaluate": args.evaluate,
    }
    return [flag for flag, is_given in flags.items() if is_given]
