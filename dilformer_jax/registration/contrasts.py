"""Detects whether two images show the same contrast, such as T1 and T1; this decides the similarity of refinement."""

import numpy as np
from jaxtyping import Float32

Image = Float32[np.ndarray, "_ _ _"]
BINS = 32
BACKGROUND = 0.05  # of the scale from 0 to 1
ENOUGH = 100  # voxels that both images show
# Pairs of T1 images have 0.78 and more after an affine alignment, 0.97 and more after a network's warp; pairs of unlike
# contrast can have as much as 0.8 (experiments/results/refinement.md).
ONE_CONTRAST, ONE_CONTRAST_WARPED = 0.75, 0.9


def linear_share(fixed: Image, moving: Image) -> float:
    """Returns the share of the dependence between two images that a rising line explains, from -1 to 1.

    This is the signed squared Pearson correlation divided by the correlation ratio (Roche et al., MICCAI 1998), the
    larger of both directions. Misalignment lowers both numbers, so that their quotient changes less. Intensities lie
    between 0 and 1, on one grid. Only voxels above the background in both images count; the result is NaN if there are
    too few of them or if an image is constant there.
    """
    tissue = (fixed > BACKGROUND) & (moving > BACKGROUND)
    f, m = (np.clip(image[tissue].astype(np.float64), 0, 1) for image in (fixed, moving))
    if len(f) < ENOUGH or f.std() == 0 or m.std() == 0:
        return float("nan")
    r = np.corrcoef(f, m)[0, 1]
    ratio = min(_correlation_ratio(f, m), _correlation_ratio(m, f))
    return float(r * abs(r) / ratio) if ratio > 0 else float("nan")


def one_contrast(fixed: Image, moving: Image, *, warped: bool = False) -> bool:
    """Returns whether the images show the same contrast, so that LNCC fits; True if `linear_share` is NaN.

    `warped` says that a network has warped the moving image to the fixed one, which allows a stricter limit.
    """
    return not linear_share(fixed, moving) < (ONE_CONTRAST_WARPED if warped else ONE_CONTRAST)


def _correlation_ratio(y, x):
    """Returns the part of the variance of y that the mean of y in each bin of x explains."""
    bins = np.minimum((x * BINS).astype(int), BINS - 1)
    voxels = np.maximum(np.bincount(bins, minlength=BINS), 1)
    mean = np.bincount(bins, y, minlength=BINS) / voxels
    return np.var(mean[bins]) / np.var(y)
