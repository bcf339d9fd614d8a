"""Which epochs of a training run were the best.

Knows nothing about schedules: the caller says which epochs have the final sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distiller.errors import CheckpointError, UsageError
from distiller.signatures import check_settings


@dataclass(frozen=True, slots=True)
class Score:
    """An epoch's validation result and sparsity.

    Attributes:
        epoch: from 0.
        top1: percent.
        top5: percent.
        loss: mean.
        sparsity: of the weights, 0..1.
        nnz: non-zero parameters.
        eligible: whether the schedule's pruning has reached its final sparsity.
    """

    epoch: int
    top1: float
    top5: float
    loss: float
    sparsity: float
    nnz: int
    eligible: bool

    def line(self) -> str:
        """Distiller's line; sparsity in percent."""
        return (
            f"==> Best [Top1: {self.top1:.3f}   Top5: {self.top5:.3f}   "
            f"Sparsity:{100 * self.sparsity:.2f}   NNZ-Params: {self.nnz:d} on epoch: {self.epoch:d}]"
        )

    def rank(self) -> tuple[bool, float, float, float]:
        """Ascending with merit: final sparsity first, then Top1, Top5, and the lower loss."""
        return self.eligible, self.top1, self.top5, -self.loss


class ScoreTracker:
    """Keeps the best epochs.

    Distiller's SparsityAccuracyTracker ranked by sparsity before accuracy, so that of a
    gradual pruning it kept the latest epochs; here accuracy decides among the epochs
    that have the schedule's final sparsity, and the earlier of equals stays.

    Args:
        num_best_scores: how many epochs to keep, 1 or more.

    Raises:
        UsageError: `num_best_scores` is less than 1.
    """

    def __init__(self, num_best_scores: int = 1) -> None:
        if num_best_scores < 1:
            raise UsageError(f"num_best_scores: must be at least 1, got {num_best_scores}")
        self._num_best_scores = num_best_scores
        self._scores: tuple[Score, ...] = ()

    @property
    def rule(self) -> str:
        """What `best` means, in a sentence."""
        return (
            "best: the epoch with the highest Top1 (then Top5, then the lowest loss) among the epochs in "
            "which pruning is complete (all epochs when nothing is pruned); until there is one, of those "
            "so far"
        )

    def step(
        self, epoch: int, top1: float, top5: float, loss: float, sparsity: float, nnz: int, eligible: bool
    ) -> bool:
        """Take in an epoch (arguments as in `Score`); returns whether it is the best so far."""
        score = Score(epoch, top1, top5, loss, sparsity, nnz, eligible)
        ranked = sorted((*self._scores, score), key=Score.rank, reverse=True)  # stable: the earlier stays
        self._scores = tuple(ranked[: self._num_best_scores])
        return self._scores[0] is score

    def best(self) -> tuple[Score, ...]:
        """The best epochs, the best first; at most `num_best_scores`."""
        return self._scores

    def state_dict(self) -> dict[str, Any]:
        """The best epochs as plain data."""
        return {"scores": [asdict(score) for score in self._scores]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off; keeps at most `num_best_scores`.

        Raises:
            CheckpointError: the state is not one that `state_dict` made.
        """
        scores = state.get("scores")
        if not isinstance(scores, list) or not all(isinstance(score, Mapping) for score in scores):
            raise CheckpointError(f"best epochs: 'scores' must be a list of scores by name, got {scores!r}")
        for index, score in enumerate(scores):
            for path, text in check_settings(Score, score):
                raise CheckpointError(f"best epochs: scores[{index}].{'.'.join(map(str, path))}: {text}")
        self._scores = tuple(Score(**score) for score in scores)[: self._num_best_scores]
