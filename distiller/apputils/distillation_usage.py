"""Flags of knowledge distillation that contradict each other, or have no use.

Knows nothing about how flags are parsed, nor about what distillation does.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

from distiller.apputils.given_flags import given_flags
from distiller.apputils.quantization_usage import flag_of
from distiller.distillation.losses import LEAST_TEMPERATURE, MOST_TEMPERATURE

__all__ = ["distillation_rules", "given_settings"]

_SETTINGS = (
    *("kd_half", "kd_no_cache", "kd_temperature", "kd_distill_wt", "kd_student_wt", "kd_teacher_wt"),
    *("kd_loss", "kd_no_t_squared", "kd_no_labels", "kd_start_epoch"),
)
"""What a schedule says when the distillation is in it."""


def given_settings(args: Namespace) -> list[str]:
    """The flags of how to distil, rather than from whom, that were given."""
    given = given_flags(args)
    return [flag_of(name) for name in _SETTINGS if name in given]


def distillation_rules(args: Namespace, given: Set[str], jobs: list[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then.

    Args:
        args: the flags by name.
        given: the names of those that were given.
        jobs: the flags of other jobs than training.
    """
    teaches = args.kd_teacher is not None
    for name in sorted(given):
        if name.startswith("kd_") and name != "kd_teacher":
            yield not teaches, f"{flag_of(name)}: goes with --kd-teacher"
    yield (
        teaches and not (args.kd_resume or args.kd_pretrained),
        "--kd-teacher: needs the teacher's weights, give --kd-resume CHECKPOINT or --kd-pretrained",
    )
    yield bool(args.kd_resume and args.kd_pretrained), "--kd-resume and --kd-pretrained: give one of them"
    yield (
        teaches and jobs not in ([], ["--dry-run"]),
        "--kd-teacher: only when training",
    )
    yield (
        not LEAST_TEMPERATURE <= args.kd_temperature <= MOST_TEMPERATURE,
        f"--kd-temperature: must be a number from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, got "
        f"{args.kd_temperature:g}",
    )
    yield (
        args.kd_no_labels and "kd_student_wt" in given and args.kd_student_wt > 0,
        "--kd-student-wt: is the weight of labels; leave it out with --kd-no-labels",
    )
    yield (
        teaches and not (args.kd_distill_wt or args.kd_teacher_wt),
        "--kd-distill-wt 0: nothing is learned from the teacher; give one above 0, or a --kd-teacher-wt",
    )
    yield (
        args.kd_start_epoch >= args.epochs,
        f"--kd-start-epoch {args.kd_start_epoch}: there is no such epoch, --epochs is {args.epochs}",
    )
    yield (
        bool(args.kd_chain_resume and not args.kd_chain),
        "--kd-chain-resume: goes with --kd-chain, give the flags of the interrupted chain",
    )
    for name, flag in (
        ("resumed_checkpoint_path", "--resume-from"),
        ("load_model_path", "--exp-load-weights-from"),
    ):
        yield (
            bool(args.kd_chain and getattr(args, name)),
            f"{flag}: not together with --kd-chain, whose networks begin untrained"
            + ("; go on with --kd-chain-resume RUN_FOLDER" if flag == "--resume-from" else ""),
        )
    yield bool(args.kd_chain and args.pretrained), "--pretrained: not together with --kd-chain"
    yield bool(args.kd_chain and args.dry_run), "--dry-run: not together with --kd-chain; leave the chain out"
