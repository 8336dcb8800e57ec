"""Closed-form maps, fitted in one streaming pass: mean shift, ridge, orthogonal Procrustes, whiten-recolour."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks this name up here when it reloads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from csdiff.adapters.base import Adapter, start_as_identity
from csdiff.errors import CSDiffError

METHODS = ("mean_shift", "whiten", "ridge", "procrustes", "coral")
_PENALTIES = tuple(10.0**power for power in range(-6, 3))
_SAMPLE_ROWS = 4096


class PairedMoments:
    r"""Count, means and covariances of text `x` (N, Dt) and image `y` (N, D) rows, added batch by batch in float64.

    Sums are kept about a fixed origin near the data, which avoids the cancellation of `E[x^2] - E[x]^2`. Memory is
    `Dt^2 + Dt*D + D^2` numbers whatever N is. Moments with the same origins add.
    """

    def __init__(self, origin_x: Tensor, origin_y: Tensor):
        self.origin_x, self.origin_y = origin_x.double(), origin_y.double()
        text_dim, image_dim = self.origin_x.numel(), self.origin_y.numel()
        self.count = 0
        self.sum_x, self.sum_y = torch.zeros(text_dim).double(), torch.zeros(image_dim).double()
        self.sum_xx = torch.zeros(text_dim, text_dim).double()
        self.sum_xy = torch.zeros(text_dim, image_dim).double()
        self.sum_yy = torch.zeros(image_dim, image_dim).double()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows `x` (B, Dt) and `y` (B, D)."""
        x, y = x.double() - self.origin_x, y.double() - self.origin_y
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.sum_xx += x.T @ x
        self.sum_xy += x.T @ y
        self.sum_yy += y.T @ y

    def __add__(self, other: "PairedMoments") -> "PairedMoments":
        total = PairedMoments(self.origin_x, self.origin_y)
        for name in ("count", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    mean_x = property(lambda self: self.origin_x + self.sum_x / self.count)
    mean_y = property(lambda self: self.origin_y + self.sum_y / self.count)
    cov_xx = property(lambda self: self._covariance(self.sum_xx, self.sum_x, self.sum_x))
    cov_xy = property(lambda self: self._covariance(self.sum_xy, self.sum_x, self.sum_y))
    cov_yy = property(lambda self: self._covariance(self.sum_yy, self.sum_y, self.sum_y))

    def _covariance(self, products: Tensor, sum_a: Tensor, sum_b: Tensor) -> Tensor:
        return products / self.count - torch.outer(sum_a, sum_b) / self.count**2

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """`mean ||y - weight x - bias||^2` over the rows, from the moments alone (`weight` is (D, Dt))."""
        offset = self.mean_y - weight @ self.mean_x - bias
        error = self.cov_yy.trace() - 2 * (weight * self.cov_xy.T).sum() + (weight @ self.cov_xx * weight).sum()
        return float(error + offset @ offset)


class LinearAdapter(Adapter):
    r"""`r = A t + b` from raw text to raw image embeddings, kept as a linear layer in whitened coordinates.

    | method       | A                                        | needs        |
    | ------------ | ---------------------------------------- | ------------ |
    | `mean_shift` | I                                        | Dt = D       |
    | `whiten`     | `diag(std_y / std_x)`                    | Dt = D       |
    | `ridge`      | `Cyx (Cxx + penalty * mean_var I)^-1`    | pairs        |
    | `procrustes` | `U V^T` of `Cyx = U S V^T`               | pairs        |
    | `coral`      | `Cyy^(1/2) Cxx^(-1/2)`                   | Dt = D       |

    with `b = mean(y) - A mean(x)`, `C` covariances (shrunk, for `coral`), `mean_var` the mean of `diag(Cxx)`.

    Args:
        method (`str`, *optional*, defaults to `"ridge"`): How it was fitted; `fit` fills the layer.

    Source: ridge, Hoerl and Kennard 1970; Procrustes, Schoenemann 1966; CORAL, Sun et al. 2016 (arXiv 1511.05547).
    """

    @register_to_config
    def __init__(self, *, embedding_dim: int, text_dim: int | None = None, method: str = "ridge"):
        super().__init__()
        text_dim = self._init_contract(embedding_dim, text_dim)
        if method not in METHODS:
            raise CSDiffError(f"`method` must be one of {', '.join(METHODS)}, found {method!r}.")
        if method in ("mean_shift", "whiten", "coral") and text_dim != embedding_dim:
            raise CSDiffError(
                f"`{method}` needs text and image embeddings of one width, found {text_dim} and {embedding_dim}; "
                "use ridge or procrustes."
            )
        self.linear = nn.Linear(text_dim, embedding_dim)
        start_as_identity(self.linear)

    def predict(self, text: Tensor, states: Tensor | None, mask: Tensor | None, latents: Tensor | None) -> Tensor:
        return self.linear(text)

    @classmethod
    def fit(
        cls,
        data: Any,
        method: str = "ridge",
        *,
        penalties: Sequence[float] = _PENALTIES,
        calibrate: bool = True,
        batch_size: int = 8192,
    ) -> "LinearAdapter":
        """Fits the map in one pass over `data`, with memory independent of the number of rows.

        Ridge takes the penalty with the least squared error on every tenth row, held out (from their moments), and is
        solved again on all rows. Held-out rows (at most 4096) also calibrate the norms, of a map fitted without them.

        Args:
            data: A store (`read(indices)` giving `text_embeds` and `image_embeds`, and a length), or an iterable of
                (text, image) batches or of dicts with those keys; raw embeddings (B, Dt) and (B, D).
            method: See the class.
            penalties: Ridge penalties to try, relative to the text's mean variance.
            calibrate: Whether predicted norms get the real mean and spread.
            batch_size: Rows read at once from a store.

        Raises:
            CSDiffError: Fewer than four rows, rows that are not finite, penalties that are not positive, or a method
                that does not fit the dimensions.
        """
        if not penalties or any(not penalty > 0 for penalty in penalties):
            raise CSDiffError(f"`penalties` must be positive numbers, found {list(penalties)}.")
        fitted, held, sample = _accumulate(data, batch_size)
        every = fitted + held
        adapter = cls(embedding_dim=every.mean_y.numel(), text_dim=every.mean_x.numel(), method=method)
        penalty = _best_penalty(fitted, held, penalties) if method == "ridge" else None
        if calibrate and held.count >= 2:
            # Rows that a map was fitted on are nearer than new ones: calibrate a map that has not seen them.
            adapter._set_map(_solve(fitted, method, penalty), fitted)
            with torch.no_grad():
                adapter.calibrate_norm(adapter.embed(sample[0]).norm(dim=1), sample[1].norm(dim=1))
        adapter._set_map(_solve(every, method, penalty), every)
        adapter.metadata["objective"] = {"name": method, "penalty": penalty, "rows": every.count}
        return adapter

    @torch.no_grad()
    def _set_map(self, weight: Tensor, moments: PairedMoments) -> None:
        """Stores `r = weight (t - mean_x) + mean_y` (`weight` (D, Dt)) in the whitened coordinates of the moments."""
        self.set_statistics(moments.mean_y, _deviations(moments.cov_yy), moments.mean_x, _deviations(moments.cov_xx))
        std, text_std = self.clip_std.double(), self.text_std.double()
        self.linear.weight.copy_(weight * text_std / std.T)
        nn.init.zeros_(self.linear.bias)


def _paired_batches(data: Any, batch_size: int) -> Iterator[list[Tensor]]:
    """Float batches (text, image) from what `LinearAdapter.fit` takes."""
    if hasattr(data, "read"):
        store, starts = data, range(0, len(data), batch_size)
        data = (store.read(torch.arange(at, min(at + batch_size, len(store))).numpy()) for at in starts)
    for batch in data:
        if isinstance(batch, dict):
            missing = [name for name in ("text_embeds", "image_embeds") if name not in batch]
            if missing:
                raise CSDiffError(f"A closed-form map needs pairs; {missing[0]!r} is missing, found {sorted(batch)}.")
            batch = batch["text_embeds"], batch["image_embeds"]
        yield [torch.as_tensor(part).detach().float().cpu() for part in batch]


def _accumulate(data, batch_size):
    """Moments of the rows to fit and of those held out, and some of the latter."""
    fitted = held = widths = None
    sample, position = [], 0
    for text, image in _paired_batches(data, batch_size):
        shapes = text.shape[1:], image.shape[1:]
        widths = widths or shapes
        if text.ndim != 2 or image.ndim != 2 or len(text) != len(image) or shapes != widths:
            raise CSDiffError(
                f"Batches must be text (B, Dt) and image (B, D) rows, of the same widths in all; found "
                f"{tuple(text.shape)} and {tuple(image.shape)} after {position} rows."
            )
        finite = text.isfinite().all(1) & image.isfinite().all(1)
        if not finite.all():
            raise CSDiffError(f"Row {position + int((~finite).nonzero()[0])} holds a value that is NaN or infinite.")
        if fitted is None:
            origins = text.double().mean(0), image.double().mean(0)
            fitted, held = PairedMoments(*origins), PairedMoments(*origins)
        out = torch.arange(position, position + len(text)) % 10 == 9
        fitted.add(text[~out], image[~out])
        held.add(text[out], image[out])
        if (room := _SAMPLE_ROWS - held.count + int(out.sum())) > 0:
            sample.append((text[out][:room], image[out][:room]))
        position += len(text)
    if position < 4:
        raise CSDiffError(f"A closed-form map needs at least 4 pairs, found {position}.")
    return fitted, held, [torch.cat(side) for side in zip(*sample, strict=True)]


def _best_penalty(fitted: PairedMoments, held: PairedMoments, penalties: Sequence[float]) -> float:
    if held.count == 0:
        return float(sorted(penalties)[len(penalties) // 2])
    errors = {}
    for penalty in penalties:
        weight = ridge(fitted.cov_xx, fitted.cov_xy, penalty).T
        errors[float(penalty)] = held.squared_error(weight, fitted.mean_y - weight @ fitted.mean_x)
    return min(errors, key=errors.get)


def ridge(cov_xx: Tensor, cov_xy: Tensor, penalty: float) -> Tensor:
    """Ridge regression in closed form, `(Cxx + penalty * mean(diag Cxx) I)^-1 Cxy`.

    Covariances (Dt, Dt) and (Dt, D) of centred inputs and targets, or their products (a common factor cancels), to the
    weight (Dt, D) with which a centred row is predicted as `x @ weight`; the penalty is relative to the mean variance.

    Source: Hoerl and Kennard 1970.
    """
    scale = (penalty * cov_xx.diagonal().mean()).clamp_min(torch.finfo(cov_xx.dtype).tiny)
    return torch.linalg.solve(cov_xx + scale * torch.eye(len(cov_xx)).to(cov_xx), cov_xy)


def _solve(moments: PairedMoments, method: str, penalty: float | None) -> Tensor:
    if method == "mean_shift":
        return torch.eye(len(moments.mean_y)).double()
    if method == "whiten":
        return torch.diag(_deviations(moments.cov_yy) / _deviations(moments.cov_xx).clamp_min(1e-12))
    if method == "ridge":
        return ridge(moments.cov_xx, moments.cov_xy, penalty).T
    if method == "procrustes":
        left, _, right = torch.linalg.svd(moments.cov_xy.T, full_matrices=False)
        return left @ right
    image, text = (_shrunk(covariance, moments.count) for covariance in (moments.cov_yy, moments.cov_xx))
    return _power(image, 0.5) @ _power(text, -0.5)


def _shrunk(covariance: Tensor, count: int) -> Tensor:
    """Oracle-approximating shrinkage towards a multiple of the identity (Chen et al. 2010; as scikit-learn's OAS)."""
    # Without it, fewer rows than dimensions leave directions without variance, which the inverse root blows up.
    size = len(covariance)
    squares, square = covariance.square().mean(), (covariance.trace() / size) ** 2
    distance = (count + 1) * (squares - square / size)
    share = ((squares + square) / distance.clamp_min(1e-300)).clamp(0, 1)
    trace = covariance.trace()
    return (1 - share) * covariance + share * trace / size * torch.eye(size).double()


def _power(covariance: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(1e-12 * values.max()) ** exponent) @ vectors.T


def _deviations(covariance: Tensor) -> Tensor:
    return covariance.diagonal().clamp_min(0).sqrt()
