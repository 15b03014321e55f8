"""Names of the structures that label ids stand for, by id."""

from collections.abc import Iterable, Mapping

# The regions of LPBA40 (Shattuck et al., NeuroImage 2008): odd ids are left, even ones right.
_LPBA40 = {
    21: "superior frontal gyrus",
    23: "middle frontal gyrus",
    25: "inferior frontal gyrus",
    27: "precentral gyrus",
    29: "middle orbitofrontal gyrus",
    31: "lateral orbitofrontal gyrus",
    33: "gyrus rectus",
    41: "postcentral gyrus",
    43: "superior parietal gyrus",
    45: "supramarginal gyrus",
    47: "angular gyrus",
    49: "precuneus",
    61: "superior occipital gyrus",
    63: "middle occipital gyrus",
    65: "inferior occipital gyrus",
    67: "cuneus",
    81: "superior temporal gyrus",
    83: "middle temporal gyrus",
    85: "inferior temporal gyrus",
    87: "parahippocampal gyrus",
    89: "lingual gyrus",
    91: "fusiform gyrus",
    101: "insular cortex",
    121: "cingulate gyrus",
    161: "caudate",
    163: "putamen",
    165: "hippocampus",
}
LPBA40: dict[int, str] = {
    id + side: f"{('left', 'right')[side]} {name}" for id, name in _LPBA40.items() for side in (0, 1)
} | {181: "cerebellum", 182: "brainstem"}

# FreeSurfer's automatic segmentation: ids of the left and of the right structure.
_SIDES = {
    (2, 41): "cerebral white matter",
    (3, 42): "cerebral cortex",
    (4, 43): "lateral ventricle",
    (5, 44): "inferior lateral ventricle",
    (7, 46): "cerebellum white matter",
    (8, 47): "cerebellum cortex",
    (10, 49): "thalamus",
    (11, 50): "caudate",
    (12, 51): "putamen",
    (13, 52): "pallidum",
    (17, 53): "hippocampus",
    (18, 54): "amygdala",
    (26, 58): "accumbens",
    (28, 60): "ventral diencephalon",
    (30, 62): "vessel",
    (31, 63): "choroid plexus",
}
FREESURFER: dict[int, str] = {
    id: f"{side} {name}" for ids, name in _SIDES.items() for id, side in zip(ids, ("left", "right"), strict=True)
} | {
    14: "third ventricle",
    15: "fourth ventricle",
    16: "brainstem",
    24: "cerebrospinal fluid",
    72: "fifth ventricle",
    77: "white matter hypointensities",
    80: "other hypointensities",
    85: "optic chiasm",
    251: "corpus callosum, posterior",
    252: "corpus callosum, mid-posterior",
    253: "corpus callosum, central",
    254: "corpus callosum, mid-anterior",
    255: "corpus callosum, anterior",
}
# The 35 structures of neurite-oasis and Learn2Reg: those of FreeSurfer that it segments in OASIS, numbered in order.
OASIS_IDS = (
    2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28, 30, 31,
    41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60, 62, 63,
)  # fmt: skip
OASIS: dict[int, str] = {number: FREESURFER[id] for number, id in enumerate(OASIS_IDS, 1)}
# Its four tissues.
OASIS_TISSUES: dict[int, str] = {
    1: "cortex",
    2: "subcortical grey matter",
    3: "white matter",
    4: "cerebrospinal fluid",
}

# The 31 regions a side of the Desikan-Killiany-Tourville protocol (Klein and Tourville, Front. Neurosci. 2012), as
# Mindboggle-101 and FreeSurfer number them: left from 1000, right from 2000.
_DKT = {
    2: "caudal anterior cingulate",
    3: "caudal middle frontal",
    5: "cuneus",
    6: "entorhinal",
    7: "fusiform",
    8: "inferior parietal",
    9: "inferior temporal",
    10: "isthmus cingulate",
    11: "lateral occipital",
    12: "lateral orbitofrontal",
    13: "lingual",
    14: "medial orbitofrontal",
    15: "middle temporal",
    16: "parahippocampal",
    17: "paracentral",
    18: "pars opercularis",
    19: "pars orbitalis",
    20: "pars triangularis",
    21: "pericalcarine",
    22: "postcentral",
    23: "posterior cingulate",
    24: "precentral",
    25: "precuneus",
    26: "rostral anterior cingulate",
    27: "rostral middle frontal",
    28: "superior frontal",
    29: "superior parietal",
    30: "superior temporal",
    31: "supramarginal",
    34: "transverse temporal",
    35: "insula",
}
DKT31: dict[int, str] = {
    first + number: f"{side} {name}"
    for first, side in ((1000, "left"), (2000, "right"))
    for number, name in _DKT.items()
}


def of(names: Mapping[int, str], ids: Iterable[int]) -> dict[int, str]:
    """The names of these ids, of those that have one."""
    return {id: names[id] for id in ids if id in names}
