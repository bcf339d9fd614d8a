"""A weight of few values, as a parametrization: each element has a code, and the codes stand for centroids.

    w = centroids[codes],    dL/dcentroid = sum of dL/dw over all elements that have its code

What is trained, and so what the optimizer sees:

    learned centroids, codes stay   the centroids (Deep Compression). The layer's own weight has no gradient:
                                    the optimizer keeps it, and leaves it as it was when it was clustered.
    codes are looked for again      the layer's own weight, by a gradient that passes unchanged; with learned
                                    centroids these too. Every so many steps each element gets the code of the
                                    centroid that is nearest to it by then.
    neither                         nothing: the weight is a constant.

An element that is exactly 0 in the layer's own weight is exactly 0, whatever its code, and does not count for
centroids or their gradients: masks work as ever. They, and whatever prunes or regularizes, act on the layer's
own weight.
Source: Han et al., Deep Compression, ICLR 2016 (arXiv 1510.00149), section 3.
Knows nothing about models.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization.codebook.kmeans_1d import Start, kmeans_1d
from distiller.quantization.codebook.linear_levels import linear_levels, nearest_level
from distiller.quantization.codebook.packing import StoredCodebook, pack_codes
from distiller.quantization.training.weight_quantizers import OutputChannels

__all__ = ["CodebookWeights", "Method", "look_up"]

Method = Literal["kmeans", "linear", "linear_interior"]


def look_up(weight: Tensor, table: Tensor, codes: Tensor, passes_gradient: bool = False) -> Tensor:
    """table[codes], but 0 where the weight is exactly 0; gradients for the table, and the weight if asked.

    Args:
        weight: full precision, any shape.
        table: (values,).
        codes: int32 or int64, in the shape of `weight`; they point into the table.
        passes_gradient: the gradient of the result is that of `weight` too (straight through); else it has
            none.

    Returns:
        In the shape, type and memory format of `weight`.

    Source: Han et al., arXiv 1510.00149, equation 3, for the gradient of the table.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or table.requires_grad):
        return _LookUp.apply(weight, table, codes, passes_gradient)
    return _looked_up(weight.detach(), table.detach(), codes)


class CodebookWeights(nn.Module):
    """Maps a weight to the values of its codebook.

    k-means of fewer elements than there are codes makes a smaller codebook.

    Args:
        weight: as it is; it is clustered now.
        num_bits: 1 to 8: 2^num_bits values.
        channels: where the output channels are, for a codebook of each; None for one.
        method: "kmeans"; "linear": levels equally far apart from the least to the largest weight;
            "linear_interior": alike, strictly between them.
        start: of k-means, see `kmeans_1d`.
        keep_zero: one of the values is 0, and stays it; so that pruned weights have a code like all others.
        is_learned: the centroids are a parameter, else a buffer.
        reassign_every: steps (calls of `count_step`) after which, in the next forward in training, each
            element gets the nearest centroid; centroids that are not learned then move to the mean of their
            elements first, linear ones to the new range. 0: never, codes stay.
        where: whose weight it is, for messages.

    Attributes:
        centroids: (codebooks, values), without the 0 of `keep_zero`.
        assignments: uint8 buffer in the shape of the weight: the codes.
        steps: int64 buffer, steps since codes were looked for; only if they ever are.

    Raises:
        QuantizationError: the weight is not finite.
    """

    centroids: Tensor
    assignments: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Tensor,
        num_bits: int,
        channels: OutputChannels | None = None,
        *,
        method: Method = "kmeans",
        start: Start = "exact",
        keep_zero: bool = False,
        is_learned: bool = True,
        reassign_every: int = 0,
        where: str = "",
    ) -> None:
        super().__init__()
        self.num_bits, self.channels = num_bits, channels
        self.method: Method = method
        self.start: Start = start
        self.keep_zero, self.is_learned, self.reassign_every = keep_zero, is_learned, reassign_every
        weight = weight.detach()
        rows = self._rows(weight)
        count = 2**num_bits - keep_zero
        if method == "kmeans":
            count = max(1, min(count, rows.shape[1]))
        centroids = torch.zeros(rows.shape[0], count, dtype=weight.dtype, device=weight.device)
        codes = torch.zeros_like(weight, dtype=torch.uint8)
        if is_learned:
            self.centroids = nn.Parameter(centroids)
        else:
            self.register_buffer("centroids", centroids)
        self.register_buffer("assignments", codes)
        self._steps = 0  # the buffer, known without waiting for its value
        if reassign_every:
            self.register_buffer("steps", torch.tensor(0))
            self.register_load_state_dict_post_hook(_read_steps)
        if not weight.is_meta:
            self._begin(weight, rows, where or type(self).__name__)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight of few values."""
        if self.training and 0 < self.reassign_every <= self._steps and not torch.compiler.is_compiling():
            self.reassign(weight)
        return look_up(weight, self._table().flatten(), self._places(weight), self.reassign_every > 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one; codes stay."""
        return weight

    def count_step(self) -> None:
        """One more step of training is done."""
        if self.reassign_every:
            self._steps += 1
            self.steps.add_(1)

    @torch.no_grad()
    def reassign(self, weight: Tensor) -> None:
        """Give each element of the full-precision weight the code of the nearest centroid, after these have
        followed their elements if they are not learned."""
        weight = weight.detach()
        rows = self._rows(weight)
        if not self.is_learned:
            moved = self._means(weight) if self.method == "kmeans" else self._levels(rows)
            self.centroids.copy_(moved)
        self._assign(weight, rows)
        self._steps = 0
        if self.reassign_every:
            self.steps.zero_()

    def codes(self, weight: Tensor) -> Tensor:
        """The codes, uint8 in the shape of the weight; with `keep_zero` pruned elements have that of 0."""
        return torch.where(weight == 0, 0, self.assignments) if self.keep_zero else self.assignments

    def stored(self, weight: Tensor) -> StoredCodebook:
        """What has to be stored of the weight.

        Args:
            weight: full precision; only which elements are exactly 0 counts.
        """
        is_pruned = weight.detach() == 0
        needs_bitmap = not self.keep_zero and bool(is_pruned.any())
        return StoredCodebook(
            pack_codes(self.codes(weight.detach()), self.code_bits),
            self.code_bits,
            self.centroids.detach(),
            pack_codes(is_pruned, 1) if needs_bitmap else None,
        )

    @property
    def codebook_size(self) -> int:
        """Values of a codebook, the 0 of `keep_zero` too."""
        return self.centroids.shape[1] + self.keep_zero

    @property
    def code_bits(self) -> int:
        """Width of a code: `num_bits`, or less for a smaller codebook."""
        return max(1, (self.codebook_size - 1).bit_length())

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return ", ".join(
            (
                f"{self.num_bits} bits",
                self.method,
                *(["per channel"] if self.channels else []),
                *(["zero kept"] if self.keep_zero else []),
                *(["learned"] if self.is_learned else []),
                *([f"codes anew every {self.reassign_every} steps"] if self.reassign_every else []),
            )
        )

    def _begin(self, weight: Tensor, rows: Tensor, where: str) -> None:
        if not bool(weight.isfinite().all()):
            raise QuantizationError(f"{where}: its weight must be finite to be clustered, and is not")
        if self.method == "kmeans":
            exact = rows.double().cpu().numpy()
            found = kmeans_1d(exact, self.centroids.shape[1], self.start, self.keep_zero)
            begun = torch.from_numpy(found)
        else:
            begun = self._levels(rows)
        with torch.no_grad():
            self.centroids.copy_(begun)
            self._assign(weight, rows)

    def _rows(self, weight: Tensor) -> Tensor:
        """(codebooks, elements of each)."""
        return weight.flatten()[None] if self.channels is None else self.channels.rows(weight)

    def _table(self) -> Tensor:
        """(codebooks, values): what code stands for what."""
        return F.pad(self.centroids, (1, 0)) if self.keep_zero else self.centroids

    def _places(self, weight: Tensor) -> Tensor:
        """Where each element's value is in the flat table."""
        places = self.assignments.int()
        if self.channels is None:
            return places
        books = torch.arange(len(self.centroids), dtype=torch.int32, device=weight.device)
        return places.add_(self.channels.spread(books.mul_(self.codebook_size), weight))

    def _assign(self, weight: Tensor, rows: Tensor) -> None:
        kind = torch.promote_types(weight.dtype, torch.float32)
        levels, order = torch.sort(self._table().detach().to(kind), dim=1, stable=True)
        codes = order.gather(1, nearest_level(rows.to(kind), levels))
        elements = self._rows(torch.arange(weight.numel(), device=weight.device).view(weight.shape))
        flat = torch.empty(weight.numel(), dtype=torch.uint8, device=weight.device)
        flat[elements.flatten()] = codes.flatten().to(torch.uint8)
        self.assignments.copy_(flat.view(weight.shape))

    def _means(self, weight: Tensor) -> Tensor:
        """The mean of the elements that have each code; the centroid itself where none has."""
        size = self._table().numel()
        places = self._places(weight).flatten()
        elements = weight.double().flatten()
        zeros = torch.zeros(size, dtype=torch.float64, device=weight.device)
        counts = zeros.index_add(0, places, (elements != 0).double())
        sums = zeros.index_add(0, places, elements)
        before = self._table().double().flatten()
        means = torch.where(counts > 0, sums / counts.clamp(min=1), before)
        return means.view(-1, self.codebook_size)[:, int(self.keep_zero) :]

    def _levels(self, rows: Tensor) -> Tensor:
        """Equally far apart over the elements that are not 0, of each codebook."""
        rows = rows.double()
        far = torch.finfo(rows.dtype).max
        low = torch.where(rows == 0, far, rows).amin(1)
        high = torch.where(rows == 0, -far, rows).amax(1)
        has_some = low <= high
        low, high = torch.where(has_some, low, 0.0), torch.where(has_some, high, 0.0)
        return linear_levels(low, high, self.centroids.shape[1], self.method == "linear_interior")


def _looked_up(weight: Tensor, table: Tensor, places: Tensor) -> Tensor:
    values = table.index_select(0, places.flatten()).view(weight.shape).to(weight.dtype)
    return torch.where(weight == 0, weight, values)


def _read_steps(quantizer: CodebookWeights, _incompatible_keys: Any) -> None:
    """After a load: the count of steps, known from here on without waiting for its value."""
    quantizer._steps = int(quantizer.steps)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Tensor, places: Tensor, passes_gradient: bool) -> Tensor:
        ctx.save_for_backward(weight, places)
        ctx.table_size, ctx.table_type = table.numel(), table.dtype
        ctx.passes_gradient = passes_gradient
        return _looked_up(weight, table, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        weight, places = ctx.saved_tensors
        of_table = None
        if ctx.needs_input_grad[1]:
            kind = torch.promote_types(grad.dtype, torch.float32)
            counted = torch.where(weight == 0, 0, grad).to(kind)
            sums = torch.zeros(ctx.table_size, dtype=kind, device=grad.device)
            of_table = sums.index_add_(0, places.flatten(), counted.flatten()).to(ctx.table_type)
        return grad if ctx.passes_gradient else None, of_table, None, None
