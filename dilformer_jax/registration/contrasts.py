"""Whether two images show one contrast, which decides the similarity that they are refined by."""

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
    """How much of what one image tells of the other is told by a rising line, from -1 to 1.

    This is the squared Pearson correlation, with its sign, over the correlation ratio (Roche et al., MICCAI 1998): the
    larger of both directions. Misalignment lowers both correlations, so that their quotient changes less. Intensities
    are from 0 to 1, on one grid; voxels count where both images are above the background. NaN where too few are, or
    where an image is constant there.
    """
    shown = (fixed > BACKGROUND) & (moving > BACKGROUND)
    f, m = (np.clip(image[shown].astype(np.float64), 0, 1) for image in (fixed, moving))
    if len(f) < ENOUGH or f.std() == 0 or m.std() == 0:
        return float("nan")
    r = np.corrcoef(f, m)[0, 1]
    told = min(_correlation_ratio(f, m), _correlation_ratio(m, f))
    return float(r * abs(r) / told) if told > 0 else float("nan")


def one_contrast(fixed: Image, moving: Image, *, warped: bool = False) -> bool:
    """Whether LNCC fits the pair, of which the moving image may be `warped` to the fixed one. Where it cannot be told,
    it does."""
    return not linear_share(fixed, moving) < (ONE_CONTRAST_WARPED if warped else ONE_CONTRAST)


def _correlation_ratio(of, by):
    """The part of the variance of one intensity that the other, in bins, explains."""
    place = np.minimum((by * BINS).astype(int), BINS - 1)
    count = np.maximum(np.bincount(place, minlength=BINS), 1)
    mean = np.bincount(place, of, minlength=BINS) / count
    return np.var(mean[place]) / np.var(of)
