"""Early exit: easy images leave the network before its end.

attach_exits_to(model, ["layer1", "layer2"])          # or a model that has exits
loss = JointLoss([0.2, 0.3])(model(images), labels)    # in training mode: all outputs
with early_exits(model, ExitRule("entropy", (0.2, 0.2))) as answer:
    logits, exits = answer(images)                     # who leaves is not computed further
"""

from distiller.branch_points import (
    BranchPoint,
    attach_exits,
    detach_exits,
    every_exit,
    exit_names,
    exits_of,
    final_output,
)
from distiller.early_exit.branches import (
    EarlyExitMgr,
    attach_exits_to,
    attach_stored_exits,
    check_branch_points,
    stored_exits,
)
from distiller.early_exit.calibration import (
    ExitTable,
    Trade,
    curve,
    exit_table,
    thresholds_for_drop,
    thresholds_for_shares,
)
from distiller.early_exit.curve_files import save_curve_csv, save_curve_png
from distiller.early_exit.executed_macs import ExitCosts, ImageCounter, exit_costs
from distiller.early_exit.loss import JointLoss, check_weights
from distiller.early_exit.places import exit_places
from distiller.early_exit.rules import CRITERIA, ExitRule, certainty, check_count
from distiller.early_exit.session import ExitOutcome, early_exits

__all__ = [
    "CRITERIA",
    "BranchPoint",
    "EarlyExitMgr",
    "ExitCosts",
    "ExitOutcome",
    "ExitRule",
    "ExitTable",
    "ImageCounter",
    "JointLoss",
    "Trade",
    "attach_exits",
    "attach_exits_to",
    "attach_stored_exits",
    "certainty",
    "check_branch_points",
    "check_count",
    "check_weights",
    "curve",
    "detach_exits",
    "early_exits",
    "every_exit",
    "exit_costs",
    "exit_names",
    "exit_places",
    "exit_table",
    "exits_of",
    "final_output",
    "save_curve_csv",
    "save_curve_png",
    "stored_exits",
    "thresholds_for_drop",
    "thresholds_for_shares",
]
