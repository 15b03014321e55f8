"""The data sets by name, each a function of the folder (or table) that it is read from."""

from collections.abc import Callable

from dilformer_jax.data.folders import folder, glob, pairs_csv
from dilformer_jax.data.generated import label_maps, phantoms
from dilformer_jax.data.ixi import ixi, ixi_2mm
from dilformer_jax.data.lpba40 import lpba40
from dilformer_jax.data.mindboggle import mindboggle
from dilformer_jax.data.oasis import oasis
from dilformer_jax.data.prepared import prepared
from dilformer_jax.data.subjects import Dataset

DATASETS: dict[str, Callable[..., Dataset]] = {
    "lpba40": lpba40,
    "ixi": ixi,
    "ixi_2mm": ixi_2mm,
    "oasis": oasis,
    "mindboggle": mindboggle,
    "folder": folder,
    "glob": glob,
    "pairs_csv": pairs_csv,
    "phantoms": phantoms,
    "label_maps": label_maps,
    "prepared": prepared,
}
