"""Pruners of whole units: filters of all coupled layers with their biases, norms, and what reads them.

What belongs together is read off the model's graph (`distiller.channel_groups`), so that what is pruned can
be removed (`distiller.thinning`) and the outputs stay what they are under the masks.
Knows nothing about when it is called, how masks are applied, or physical removal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.channel_groups import ChannelGroup, GroupMember
from distiller.errors import DistillerError
from distiller.interfaces import DataDrivenPruner, StepContext
from distiller.names import named_modules, named_parameters, owner
from distiller.pruning.activation_statistics import RunningMean
from distiller.pruning.channel_units import unit_l1_norms, unit_l2_norms, unit_loss_removed, unit_scales
from distiller.pruning.group_pruner import GroupPruner
from distiller.pruning.group_targets import GroupTarget, Share
from distiller.pruning.settings import FractionBelowOne, LevelsByName, Names, checked_whole_number
from distiller.registry import PRUNERS
from distiller.tensor_cuts import TensorCuts

__all__ = ["StructuredGroupPruner", "StructuredGroupTaylorPruner"]


@PRUNERS.register
class StructuredGroupPruner(GroupPruner):
    """Prunes the units of coupled channels that weigh least, in every layer that has a share of them.

    A unit is a channel with all that goes with it: the filters of every layer that makes it (several where
    outputs are added), their biases, batch-norm scales and shifts, and the channels of the layers that read
    it. All of that is masked, so that the network can be made smaller without changing its outputs:

        score(unit) = sum |w|                        criterion l1, over its filters in all layers
        score(unit) = sqrt(sum w^2)                  criterion l2, over the same
        score(unit) = sum |gamma|                    criterion batch_norm, over its batch norms

    Groups of units and what they are coupled with are read off the model's graph (`model.input_shape` says
    what its input is like). With `ranking: global` a score is divided by the mean of its group.

    Without an initial value all is pruned in the policy's first epoch. With one, the target follows
    `agp_sparsity` over its window; with `mini_batch_pruning_frequency` also within an epoch. Units that are
    zero already go first. Shares are of the network as the pruner finds it first, also when units are removed
    on the way.

    Args:
        name: the instance's name in the schedule.
        model: what is pruned; a schedule's reader supplies it.
        criterion: 'l1', 'l2' or 'batch_norm', which every chosen group needs a batch norm for.
        final_sparsity: the share of the units to prune, in [0, 1), at most `max_sparsity`: of each group
            with local ranking, of all chosen groups together with global ranking. Give this, `final_macs` or
            `levels`.
        final_macs: the share of the dense model's multiply-accumulates to end with, in (0, 1], counted as if
            pruned units were removed. It is undercut by less than one step.
        initial_sparsity: with `final_sparsity` or `levels`, the share at the policy's first epoch, in [0, 1).
        initial_macs: with `final_macs`, the share at the policy's first epoch, in (0, 1].
        ranking: 'local' to prune the same share of each group, as nearly as whole units can; 'global' to
            prune the units of lowest score wherever they are.
        weights: names and patterns of weights (biases, norms) whose groups are pruned; left out: every group
            that can be.
        protected: names and patterns of weights (biases, norms) whose groups stay whole.
        round_to: a group that is pruned keeps a multiple of so many units; one that has no more than that
            stays whole. Default 1.
        max_sparsity: the share of a group that may go at most, in (0, 1]; one unit always stays. Default
            0.9, so that a global ranking does not close a layer.
        levels: the share of the units to prune of each group, in [0, 1), at most `max_sparsity`, by the name
            or a pattern of one of its weights (biases, norms); in place of `weights`. A name wins over a
            pattern, and any other pattern over `*`.

    Raises:
        DistillerError: an argument out of range, or not one of the three targets.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900) for groups and scores
    relative to them; Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710) for norms of
    filters; Liu et al., "Network Slimming" (arXiv 1708.06519) for batch-norm scales.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        criterion: Literal["l1", "l2", "batch_norm"] = "l1",
        final_sparsity: FractionBelowOne | None = None,
        final_macs: Share | None = None,
        initial_sparsity: FractionBelowOne | None = None,
        initial_macs: Share | None = None,
        ranking: Literal["local", "global"] = "local",
        weights: Names | None = None,
        protected: Names | None = None,
        round_to: Annotated[int, checked_whole_number(1)] = 1,
        max_sparsity: Share = 0.9,
        levels: LevelsByName | None = None,
    ) -> None:
        if criterion not in ("l1", "l2", "batch_norm"):
            raise DistillerError(f"criterion must be 'l1', 'l2' or 'batch_norm', got '{criterion}'")
        target = GroupTarget.of(
            final_sparsity, final_macs, initial_sparsity, initial_macs, max_sparsity, levels
        )
        super().__init__(name, model, target, ranking, weights, protected, round_to, max_sparsity)
        self.criterion = criterion
        self.ranks_by_weight = criterion != "batch_norm"

    def _scores(self, params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
        if self.criterion == "batch_norm":
            return unit_scales(params, group, self._scales(group))
        return (unit_l1_norms if self.criterion == "l1" else unit_l2_norms)(params, group)

    def _check_group(self, group: ChannelGroup) -> None:
        if self.criterion == "batch_norm" and not self._scales(group):
            raise DistillerError(
                "criterion 'batch_norm' needs a batch norm with scales on these channels, got none; make the "
                "group protected, or take another criterion"
            )

    def _scales(self, group: ChannelGroup) -> list[str]:
        modules = dict(named_modules(self._model))
        owners = {member.name: modules.get(owner(member.name)) for member in group.members}
        return [
            name for name, module in owners.items()
            if isinstance(module, _BatchNorm) and name.endswith(".weight")
        ]  # fmt: skip


@PRUNERS.register
class StructuredGroupTaylorPruner(GroupPruner, DataDrivenPruner):
    """Prunes the units of coupled channels that the loss depends on least, to first order.

        score(unit) = mean over mini-batches of (sum w * gradient)^2

    The sum is over the weights with which layers read the unit's channels: without them the unit has no
    effect. In networks of convolutions, batch norms and ReLUs it is that over the scales and shifts of the
    batch norms of all layers that make the unit, the gates of Taylor-FO-BN taken jointly; it needs no batch
    norm, and no order of layers. Of channels that no layer reads by weights, as queries and keys, the filters
    and biases count. Mini-batches are those of training seen since the last masks.

    What a unit is, what is masked, and the arguments are those of `StructuredGroupPruner`, without
    `criterion`.

    Args:
        name: the instance's name in the schedule.
        model: what is pruned; a schedule's reader supplies it.
        final_sparsity: the share of the units to prune, in [0, 1); this, `final_macs` or `levels`.
        final_macs: the share of the dense model's multiply-accumulates to end with, in (0, 1].
        initial_sparsity: with `final_sparsity` or `levels`, the share at the policy's first epoch, in [0, 1).
        initial_macs: with `final_macs`, the share at the policy's first epoch, in (0, 1].
        ranking: 'local' or 'global'.
        weights: names and patterns of weights whose groups are pruned; left out: every group that can be.
        protected: names and patterns of weights whose groups stay whole.
        round_to: a group that is pruned keeps a multiple of so many units. Default 1.
        max_sparsity: the share of a group that may go at most, in (0, 1]. Default 0.9.
        levels: the share of the units to prune of each group, by the name or a pattern of one of its weights;
            in place of `weights`.

    Raises:
        DistillerError: an argument out of range, or not one of the three targets.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), section
    3, Taylor-FO of a set of parameters.
    """

    ranks_by_weight = False

    def __init__(
        self,
        name: str,
        model: nn.Module,
        final_sparsity: FractionBelowOne | None = None,
        final_macs: Share | None = None,
        initial_sparsity: FractionBelowOne | None = None,
        initial_macs: Share | None = None,
        ranking: Literal["local", "global"] = "local",
        weights: Names | None = None,
        protected: Names | None = None,
        round_to: Annotated[int, checked_whole_number(1)] = 1,
        max_sparsity: Share = 0.9,
        levels: LevelsByName | None = None,
    ) -> None:
        target = GroupTarget.of(
            final_sparsity, final_macs, initial_sparsity, initial_macs, max_sparsity, levels
        )
        super().__init__(name, model, target, ranking, weights, protected, round_to, max_sparsity)
        self._means: dict[str, RunningMean] = {}

    def attach(self, model: nn.Module) -> None:
        """Nothing: gradients come with `after_backward`."""

    def detach(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Forget the scores."""
        self.seen, self._means = 0, {}

    def after_backward(self, params: Mapping[str, nn.Parameter], ctx: StepContext) -> None:
        """Take in the gradients of a mini-batch; groups that they have not all reached are left out."""
        self.seen += 1
        everything = ctx.masks.params
        for group in self._found().chosen:
            readers = _readers(everything, group)
            gradients = {m.name: g for m in readers if (g := everything[m.name].grad) is not None}
            if len(gradients) == len(readers):
                removed = unit_loss_removed(everything, gradients, readers)
                self._means.setdefault(group.name, RunningMean()).add(removed.square(), 1)

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Find the groups anew, and begin to collect anew."""
        super().follow_thinning(cuts)
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """The dense network's numbers, mini-batches seen, and sums of scores by group and device."""
        means = {name: mean.state_dict() for name, mean in self._means.items()}
        return {**super().state_dict(), "seen": self.seen, "means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the scores in `state`."""
        super().load_state_dict(state)
        self.seen = state["seen"]
        self._means = {name: RunningMean.from_state(part) for name, part in state["means"].items()}

    def _check_group(self, group: ChannelGroup) -> None:
        params = dict(named_parameters(self._model))
        frozen = [m.name for m in _readers(params, group) if not params[m.name].requires_grad]
        if frozen:
            raise DistillerError(
                f"'{frozen[0]}', by which its units are ranked, is not trained (requires_grad is False), and "
                "has no gradients; train it, protect the group, or take another pruner"
            )

    def _scores(self, params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
        if group.name not in self._means:
            names = ", ".join(member.name for member in _readers(params, group))
            raise DistillerError(
                f"there are no scores to rank by after {self.seen} mini-batches; gradients must reach "
                f"{names}: train them, or take another pruner"
            )
        return self._means[group.name].mean()


def _readers(params: Mapping[str, Tensor], group: ChannelGroup) -> list[GroupMember]:
    """The weights that read a group's channels, or where there are none those that make them."""
    by_role = [
        [m for m in group.members if m.role == role and m.name in params] for role in ("input", "output")
    ]
    return by_role[0] or by_role[1]
