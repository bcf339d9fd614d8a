"""Flags of the jobs other than training."""

from __future__ import annotations

import argparse

from command_line.argument_types import at_least, fraction, not_empty


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """What is done instead of training."""
    group = parser.add_argument_group("jobs other than training")
    group.add_argument("-e", "--evaluate", action="store_true", help="test and exit")
    group.add_argument("--summary", action=_Summary, metavar="WHAT",
        help="sparsity, compute, model, modules or low-rank: print; png or png_w_params (with the "
        "parameters): draw the graph into OUT_DIR/<arch>.png or <arch>_w_params.png; and exit; may be "
        "repeated")  # fmt: skip
    group.add_argument("--export-onnx", nargs="?", const="model.onnx", type=not_empty, metavar="FILE",
        help="write the model with a softmax to an ONNX file, compare it in onnxruntime, and exit; a bare "
        "name is put into the run folder (default: model.onnx)")  # fmt: skip
    group.add_argument("--thinnify", action="store_true",
        help="remove the filters and channels that are zero from the model of --resume-from (or "
        "--exp-load-weights-from), save the smaller one, and exit")  # fmt: skip
    group.add_argument("--greedy", action="store_true",
        help="prune filters where it costs the least accuracy, group by group, and exit")  # fmt: skip
    group.add_argument("--greedy-target-density", type=fraction(above=0, below=1), metavar="D",
        help="with --greedy: end at this share of the MACs")  # fmt: skip
    group.add_argument("--greedy-pruning-step", type=fraction(above=0, below=1), default=0.1, metavar="P",
        help="share of a group's remaining filters pruned at once (default: %(default)s)")  # fmt: skip
    group.add_argument("--greedy-ft-epochs", type=at_least(0), default=1, metavar="N",
        help="epochs of fine-tuning of a candidate; --epochs is not read (default: %(default)s)")  # fmt: skip
    group.add_argument("--greedy-finetuning-policy", type=str.lower, choices=("constant", "linear-grow"),
        default="constant", help="training images of an epoch: all of --effective-train-size, or the share "
        "of them that the MACs have been pruned by (default: %(default)s)")  # fmt: skip


class _Summary(argparse.Action):
    choices_now = ("sparsity", "compute", "model", "modules", "low-rank", "png", "png_w_params")

    def __call__(self, parser, namespace, values, option_string=None):
        what = str(values).lower()
        if what not in self.choices_now:
            choices = ", ".join(self.choices_now)
            parser.error(f"argument {option_string}: invalid choice: '{what}' (choose from {choices})")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), what])
