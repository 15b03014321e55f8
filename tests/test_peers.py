"""Overlaps and surface distances beside the programs whose definitions they are, where the extra `peers` is installed:
MedPy, DeepMind's surface-distance and MONAI."""

import importlib.util

import numpy as np
import pytest
from label_maps import LPBA40, blobs, crop, cube

from dilformer_jax.ops import overlap
from dilformer_jax.ops.surfaces import surface_scores

SHAPE = (16, 15, 14)
BLOCK = cube(SHAPE, (2, 2, 2), (6, 6, 6))
CASES = {
    "touching the lower faces": (cube(SHAPE, (0, 0, 0), (5, 6, 7)), cube(SHAPE, (0, 3, 7), (5, 6, 7))),
    "touching the upper faces": (cube(SHAPE, (11, 9, 7), (5, 6, 7)), cube(SHAPE, (10, 8, 6), (6, 7, 8))),
    "the whole volume": (np.ones(SHAPE, np.int32), cube(SHAPE, (1, 1, 1), (14, 13, 12))),
    "one voxel": (cube(SHAPE, (3, 3, 3), (1, 1, 1)), cube(SHAPE, (8, 4, 5), (1, 1, 1))),
    "a voxel and a block": (cube(SHAPE, (15, 14, 13), (1, 1, 1)), BLOCK),
    "a thin sheet": (cube(SHAPE, (3, 0, 0), (1, 15, 14)), cube(SHAPE, (6, 2, 3), (1, 9, 8))),
    "an outlier": (BLOCK, BLOCK + cube(SHAPE, (14, 13, 12), (1, 1, 1))),
    "the same": (BLOCK, BLOCK),
    **{f"blobs {seed}": (blobs(seed), blobs(seed + 1)) for seed in (0, 2, 4)},
}
SPACINGS = ((1.0, 1.0, 1.0), (0.7, 2.0, 1.3), (3.0, 0.5, 1.0))
PAIRS = (("S35", "S36"), ("S37", "S38"), ("S39", "S40"), ("S36", "S39"), ("S11", "S24"))
# DeepMind's package uses a name of SciPy's that is on its way out, and MONAI one of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please (use|import) `:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning"),
]


def medpy(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, float]:
    binary = pytest.importorskip("medpy.metric.binary")
    found = {key: getattr(binary, key)(a, b, spacing) for key in ("hd", "hd95", "assd")}
    return {"dice": binary.dc(a, b), **found}


def deepmind(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, float]:
    peer = pytest.importorskip("surface_distance")
    distances = peer.compute_surface_distances(a, b, spacing)
    return {
        "dice": peer.compute_dice_coefficient(a, b),
        "hd95_max": peer.compute_robust_hausdorff(distances, 95),
        "nsd": peer.compute_surface_dice_at_tolerance(distances, tolerance),
    }


def monai(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, float]:
    torch, peer = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    # Its percentile is the larger of two directed ones, each surface voxel counted once: nobody's HD95 but its own.
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (a, b)]
    options = {"include_background": True, "spacing": spacing}
    found = {
        "dice": peer.compute_dice(*masks),
        "hd": peer.compute_hausdorff_distance(*masks, **options),
        "assd": peer.compute_average_surface_distance(*masks, symmetric=True, **options),
        "nsd": peer.compute_surface_dice(*masks, [tolerance], use_subvoxels=True, **options),
    }
    return {key: float(value) for key, value in found.items()}


PEERS = {"medpy": medpy, "surface_distance": deepmind, "monai": monai}


def scores(fixed: np.ndarray, moved: np.ndarray, labels: list[int], spacing: tuple[float, ...], tolerance: float):
    found = surface_scores(fixed, moved, labels, spacing, tolerance=tolerance)
    return {"dice": overlap.dice(fixed, moved, labels), **found}


def compare(ours: dict[str, np.ndarray], k: int, theirs: dict[str, float]) -> None:
    for key, value in theirs.items():
        # In mm, and parts of one.
        assert ours[key][k] == pytest.approx(value, rel=0, abs=1e-6 if key in ("dice", "nsd") else 1e-4), key


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_random_and_hand_made_cases_agree(peer, spacing):
    pytest.importorskip(peer)
    for name, (fixed, moved) in CASES.items():
        labels = [1, 2, 3] if name.startswith("blobs") else [1]
        ours = scores(fixed, moved, labels, spacing, spacing[1])
        for k, label in enumerate(labels):
            compare(ours, k, PEERS[peer](fixed == label, moved == label, spacing, spacing[1]))


@pytest.mark.data
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_real_brains_agree(pair, shared_data):
    import nibabel as nib

    fixed, moved = (np.asarray(nib.load(shared_data / "lpba40" / f"{name}_seg.nii.gz").dataobj) for name in pair)
    labels = [LPBA40[k] for k in (3, 47)]
    spacing = (0.8, 1.5, 1.1) if pair == PAIRS[-1] else (1.0, 1.0, 1.0)
    ours = scores(fixed, moved, labels, spacing, 1.0)
    peers = [PEERS[name] for name in PEERS if importlib.util.find_spec(name)]
    if not peers:
        pytest.skip("none of MedPy, surface-distance and MONAI is installed")
    for k, label in enumerate(labels):
        for peer in peers:
            compare(ours, k, peer(*crop(fixed == label, moved == label), spacing, 1.0))


def test_the_areas_of_surface_elements_are_deepminds():
    tables = pytest.importorskip("surface_distance.lookup_tables")
    from dilformer_jax.ops import surfels

    for spacing in SPACINGS:
        theirs = tables.create_table_neighbour_code_to_surface_area(spacing)
        np.testing.assert_allclose(surfels.areas(spacing), theirs, atol=1e-12)
