"""Brain-like T1 volumes with labels, made from a seed: the data that every clone has.

The anatomy is a set of formulas over a reference frame of 68 x 85 x 68 units with its origin in the middle of the brain
and axes right, anterior, superior, so that a seed gives the same brain on any grid. A subject is that anatomy with its
own smooth deformation, ventricles, nuclei, folds, contrast, bias field and noise. Subjects differ by the deformation
above all, which a registration can recover; their folds differ in kind and remain as an error that no registration
removes.
"""

from collections.abc import Sequence

import numpy as np

LABELS: dict[int, str] = {
    1: "left frontal cortex",
    2: "right frontal cortex",
    3: "left parietal cortex",
    4: "right parietal cortex",
    5: "left temporal cortex",
    6: "right temporal cortex",
    7: "left occipital cortex",
    8: "right occipital cortex",
    9: "left white matter",
    10: "right white matter",
    11: "left lateral ventricle",
    12: "right lateral ventricle",
    13: "left thalamus",
    14: "right thalamus",
    15: "left caudate",
    16: "right caudate",
    17: "left putamen",
    18: "right putamen",
    19: "left cerebellum",
    20: "right cerebellum",
    21: "brainstem",
}

# Lengths are in units of the reference frame, about 2 mm in a head.
FRAME = (68.0, 85.0, 68.0)
THICKNESS = 2.3  # of the cortex
SULCUS_DEPTH = 7.0
SULCUS_HALF_WIDTH = 0.4
CORE = (19.0, 24.0, 12.0)  # radii of the middle of the brain, which no sulcus enters
SHARED_FOLDS = 0.4  # share of the variance of the folding pattern that all subjects have in common
FOLD_WAVELENGTH = 24.0
WARP_WAVELENGTHS = (30.0, 50.0)
WARP_AMPLITUDE = 1.3  # standard deviation of each of the WARP_ROUNDS warps, per axis
WARP_ROUNDS = 3

Vector = Sequence[float | int] | np.ndarray


def phantom(seed: int, shape: tuple[int, int, int] = (64, 80, 64)) -> tuple[np.ndarray, np.ndarray]:
    """The brain of a seed: its image and its labels.

    Args:
      seed: non-negative; names the subject. Equal seeds give bit-identical arrays whatever was made before; only
        another processor or NumPy may round differently.
      shape: of the grid, right x anterior x superior; the brain is stretched to fill it.

    Returns:
      A float32 image in [0, 1], exactly 0 outside the brain and above 0 inside, and uint8 labels, keys of `LABELS`,
      with 0 for the background and for the fluid in sulci and third ventricle.

    Raises:
      ValueError: if an axis is shorter than 32 voxels.
    """
    if min(shape) < 32:
        raise ValueError(f"a phantom needs three axes of at least 32 voxels, not {tuple(shape)}")
    warps, folds, sizes, contrast, noise = (
        np.random.default_rng(s) for s in np.random.SeedSequence([0xB12A1, seed]).spawn(5)
    )
    voxel = np.array(FRAME) / shape
    axes = (((np.arange(n) + 0.5) / n - 0.5) * extent for n, extent in zip(shape, FRAME, strict=True))
    frame = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    points = frame
    for _ in range(WARP_ROUNDS):
        # A few small warps after one another reach further than one large one without folding space.
        points = points + drift(points, warps)
    points = aligned(points, frame)

    distance = anatomy(points, sizes)
    distance["sulcus"] = sulci(points, distance["cerebrum"], folds, voxel)
    return paint(points, distance, contrast, noise, float(voxel.mean()))


def waves(
    points: np.ndarray, generator: np.random.Generator, count: int, wavelengths: tuple[float, float]
) -> np.ndarray:
    """A smooth random field of unit variance: `count` plane waves of random direction and phase, at points (3, ...)."""
    directions = generator.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = (2 * np.pi / generator.uniform(*wavelengths, size=(count, 1)) * directions).astype(np.float32)
    phases = generator.uniform(0, 2 * np.pi, size=count).astype(np.float32)
    total = np.zeros(points.shape[1:], np.float32)
    for (a, b, c), phase in zip(vectors, phases, strict=True):
        total += np.cos(a * points[0] + b * points[1] + c * points[2] + phase)
    return total * np.float32(np.sqrt(2 / count))


def drift(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One small smooth displacement (3, ...), in part the same in both hemispheres, as in a head."""
    free = np.stack([waves(points, generator, 8, WARP_WAVELENGTHS) for _ in range(3)])
    twin = np.stack([waves(mirrored(points), generator, 8, WARP_WAVELENGTHS) for _ in range(3)])
    # The midline nearly stays where it is, so that neither hemisphere grows into the other's place.
    away = points[0] / np.sqrt(points[0] ** 2 + 36)
    twin[0] *= away
    free[0] *= 0.4 + 0.6 * away**2
    # Skulls differ less than what is in them.
    inside = np.clip(1.4 - length(points / column((29, 38, 29))), 0.8, 1)
    return WARP_AMPLITUDE * inside * (np.float32(np.sqrt(0.4)) * free + np.float32(np.sqrt(0.6)) * twin)


def aligned(points: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The warped `points` less the affine part of their displacement over the brain: an affine finds nothing to do."""
    brain = length(frame / column((27, 36, 25))) < 1
    basis = np.concatenate([frame, np.ones_like(frame[:1])])[:, brain].T.astype(np.float64)
    affine = np.linalg.lstsq(basis, (points - frame)[:, brain].T.astype(np.float64), rcond=None)[0].astype(np.float32)
    return points - np.einsum("ij,i...->j...", affine[:3], frame) - column(affine[3])


def ellipsoid(points: np.ndarray, centre: Vector, radii: Vector) -> np.ndarray:
    """Distance to an ellipsoid, negative inside, to first order at the surface (Inigo Quilez, "Ellipsoid - SDF")."""
    offset = points - column(centre)
    near, steep = length(offset / column(radii)), length(offset / column(radii) ** 2)
    return near * (near - 1) / np.maximum(steep, 1e-6)


def tube(points: np.ndarray, path: Sequence[Sequence[float | int]]) -> np.ndarray:
    """Distance to a tube through (x, y, z, radius) points, negative inside."""
    nearest = np.full(points.shape[1:], np.inf, np.float32)
    nodes = np.asarray(path, np.float32)
    for start, end in zip(nodes[:-1], nodes[1:], strict=True):
        offset, axis = points - column(start[:3]), column(end[:3] - start[:3])
        along = np.clip((offset * axis).sum(0) / (axis**2).sum(), 0, 1)
        radius = start[3] + along * (end[3] - start[3])
        nearest = np.minimum(nearest, length(offset - along * axis) - radius)
    return nearest


def union(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Distance to the union of two bodies, its crease filled over about `blend`."""
    mix = np.clip(0.5 + 0.5 * (b - a) / np.float32(blend), 0, 1)
    return b + mix * (a - b) - np.float32(blend) * mix * (1 - mix)


def length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(0))


def column(values: Vector) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(3, 1, 1, 1)


def mirrored(points: np.ndarray) -> np.ndarray:
    """Both hemispheres laid onto the right one, smoothly across the midline."""
    return np.concatenate([np.sqrt(points[:1] ** 2 + 1) - 1, points[1:]])


def anatomy(points: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Distance to each body, negative inside; size and place of ventricles and nuclei vary by subject and side."""
    half = mirrored(points)
    top = ellipsoid(points, (0, 0, 3), (27, 36, 24))
    base = -10.0 - 0.08 * points[1] - points[2]  # the flat underside of the cerebrum
    cerebrum = -union(-top, -base, 6.0)
    cerebrum = union(cerebrum, ellipsoid(points, (0, 4, -9), (13, 16, 7)), 4.0)
    cerebrum = union(cerebrum, tube(half, ((14, 15, -9, 7.0), (15, 2, -10, 9.0), (14, -14, -6, 8.5))), 2.5)
    bodies = {
        "cerebrum": cerebrum,
        "cerebellum": ellipsoid(half, (8.5, -20, -17), (12.5, 11, 8.5)),
        "brainstem": tube(points, ((0, -3, -3, 5.0), (0, -5, -13, 5.5), (0, -8, -26, 3.4))),
        "third ventricle": ellipsoid(points, (0, -3, -1), (0.9, 8, 5.5)),
    }
    sides: dict[str, list[np.ndarray]] = {"ventricle": [], "thalamus": [], "caudate": [], "putamen": []}
    swelling = np.exp(0.2 * generator.normal())
    for _ in range(2):
        swollen = swelling * np.exp(0.08 * generator.normal())
        path = ((4.0, 16, 4, 2.2), (3.8, 4, 7.5, 2.6), (4.5, -8, 7.5, 2.8), (9, -17, 3, 3.2), (15, -8, -8, 1.6))
        sides["ventricle"].append(tube(half, [(x, y, z, r * swollen) for x, y, z, r in path]))
        moves, scales = generator.normal(scale=0.6, size=(3, 3)), np.exp(generator.normal(scale=0.07, size=3))
        moved = [half - column(move) for move in moves]
        push = (swollen - 1) * 2.5
        sides["thalamus"].append(ellipsoid(moved[0], (5.6, -4, 0), scales[0] * np.array([5.1, 8.0, 5.5])))
        head, tail = (8.2 + push, 12, 2, 3.9 * scales[1]), (9.0 + push, -4, 8.5, 2.2 * scales[1])
        sides["caudate"].append(tube(moved[1], (head, (8.6 + push, 6, 6, 3.2 * scales[1]), tail)))
        turned = np.stack([moved[2][0] + 0.2 * moved[2][1], moved[2][1], moved[2][2]])
        sides["putamen"].append(ellipsoid(turned, (15.6, 4, -0.5), scales[2] * np.array([3.9, 10.3, 6.9])))
    left = points[0] < 0
    return bodies | {name: np.where(left, *pair) for name, pair in sides.items()}


def sulci(points: np.ndarray, cerebrum: np.ndarray, generator: np.random.Generator, voxel: np.ndarray) -> np.ndarray:
    """Distance to the nearest sulcus: sheets that run inwards from the hull, on lines where a random field is zero."""
    x, y, z = points
    # Each hemisphere's field is constant along rays from its middle, so that the sheets stand upright on the hull.
    rays = points - np.stack([np.where(x < 0, -9, 9), np.zeros_like(x), np.full_like(x, 1)]).astype(np.float32)
    height = np.maximum(length(rays / column((18, 35, 24))), 0.05)
    surface = rays / height
    wavelengths = (0.85 * FOLD_WAVELENGTH, 1.15 * FOLD_WAVELENGTH)
    own = waves(surface, generator, 24, wavelengths)
    # The pattern that all brains have in common: its generator is a constant.
    common = waves(surface, np.random.default_rng(20), 24, wavelengths)
    field = np.sqrt(SHARED_FOLDS) * common + np.sqrt(1 - SHARED_FOLDS) * own
    depth = SULCUS_DEPTH * (1 + 0.25 * waves(surface, generator, 8, (25.0, 45.0)))
    minor = wave_sheet(field, FOLD_WAVELENGTH * height, voxel)
    major = np.minimum(sheet(central(points), voxel), sheet(parieto_occipital(points), voxel))
    major = np.where(z > -4, major, 99)
    lateral = np.where((np.abs(x) > 10) & (y > -16), sheet(sylvian(points), voxel), 99)
    deeper = np.maximum(np.maximum(-cerebrum - depth, -ellipsoid(points, (0, 0, 1), CORE)), 0)
    nearest = np.minimum(np.hypot(minor, deeper), np.hypot(np.minimum(major, lateral), np.maximum(deeper - 2, 0)))
    # Between the hemispheres, down to the corpus callosum.
    callosum = ellipsoid(points, (0, 0, -2), (99, 24, 12))
    return np.minimum(nearest, np.hypot(x, np.maximum(-callosum, 0)))


def wave_sheet(field: np.ndarray, wavelength: np.ndarray, voxel: np.ndarray) -> np.ndarray:
    """Distance to the zero surface of a wave: exact for a plane wave of any amplitude."""
    number = 2 * np.pi / wavelength
    return np.arctan2(number * np.abs(field), length(np.stack(np.gradient(field, *voxel)))) / number


def sheet(field: np.ndarray, voxel: np.ndarray) -> np.ndarray:
    """Distance to the zero surface of a field, to first order."""
    slope = length(np.stack(np.gradient(field, *voxel)))
    return np.abs(field) / np.maximum(slope, 0.08)


def central(points: np.ndarray) -> np.ndarray:
    """Positive in front of the central sulcus."""
    return points[1] - 5 + 0.35 * points[2] + 0.15 * np.abs(points[0]) + 1.5 * np.sin(0.4 * points[0])


def parieto_occipital(points: np.ndarray) -> np.ndarray:
    """Positive in front of the parieto-occipital sulcus."""
    return points[1] + 18 + 0.35 * points[2] + 1.5 * np.cos(0.35 * points[0])


def sylvian(points: np.ndarray) -> np.ndarray:
    """Positive above the lateral fissure."""
    return points[2] + 3 + 0.22 * points[1] + np.sin(0.4 * points[1])


def lobes(points: np.ndarray) -> np.ndarray:
    """The label of the left cortex of each voxel's lobe: 1, 3, 5 or 7."""
    front = np.where(central(points) > 0, 1, 3)
    lobe = np.where((sylvian(points) < 0) & (np.abs(points[0]) > 5), 5, front)
    return np.where(parieto_occipital(points) < 0, 7, lobe)


def paint(
    points: np.ndarray,
    distance: dict[str, np.ndarray],
    contrast: np.random.Generator,
    noise: np.random.Generator,
    voxel: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Tissues and labels laid over one another, each tissue's edge soft over a voxel as partial volume makes it."""
    level = dict(fluid=0.17, cortex=0.52, white=0.85, deep=0.54, thalamus=0.60, cerebellum=0.57, stem=0.78)
    level = {name: value + 0.025 * contrast.normal() for name, value in level.items()}
    right = points[0] > 0
    image, labels = np.zeros(right.shape, np.float32), np.zeros(right.shape, np.uint8)

    def lay(depth: np.ndarray, tissue: str, label: np.ndarray | int) -> None:
        """Adds what lies where `depth` (in reference units) is positive."""
        share = np.clip(0.5 + depth / voxel, 0, 1)
        image[...] += share * (level[tissue] - image)
        labels[...] = np.where(depth > 0, label, labels)

    pial = np.minimum(-distance["cerebrum"], distance["sulcus"] - SULCUS_HALF_WIDTH)
    # No cortex where the brainstem and the thalami leave the underside.
    core = -ellipsoid(points, (0, -2, -4), (11, 13, 13))
    mask = np.minimum(np.minimum(distance["cerebrum"], distance["cerebellum"]), distance["brainstem"]) < 0

    lay(-distance["cerebellum"], "cerebellum", 19 + right)
    folia = np.sin(1.3 * (points[2] + 17) + 0.06 * (points[1] + 20) ** 2)
    lay(np.minimum(-distance["cerebellum"], 1.2 * folia - 0.9), "fluid", 19 + right)
    lay(-distance["cerebellum"] - 4.5, "white", 19 + right)
    lay(-distance["brainstem"], "stem", 21)
    lay(-distance["cerebrum"], "fluid", 0)
    lay(pial, "cortex", lobes(points) + right)
    lay(np.maximum(pial - THICKNESS, np.minimum(core, -distance["cerebrum"])), "white", 9 + right)
    lay(-distance["thalamus"], "thalamus", 13 + right)
    lay(-distance["caudate"], "deep", 15 + right)
    lay(-distance["putamen"], "deep", 17 + right)
    lay(-distance["ventricle"], "fluid", 11 + right)
    lay(-distance["third ventricle"], "fluid", 0)

    bias = np.exp(0.06 * waves(points, contrast, 4, (90.0, 160.0)))
    image *= bias * contrast.uniform(0.9, 1.0)
    image += 0.018 * noise.standard_normal(image.shape, np.float32)
    return np.where(mask, np.clip(image, 0.01, 1), 0).astype(np.float32), np.where(mask, labels, 0).astype(np.uint8)
