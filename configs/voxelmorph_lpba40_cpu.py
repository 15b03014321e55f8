r"""VoxelMorph-2 on LPBA40 at half resolution: the row beside configs/lpba40_cpu.py.

The same images, pairs, window, regulariser and about the same time as lpba40_cpu.py; one displacement, at 80x96x80, so
a loss of one level. Command:

    python -m dilformer_jax.train --config configs/voxelmorph_lpba40_cpu.py --workdir runs/voxelmorph \
        --config.data.directory=DIR

Measured: mean Dice 0.522 -> 0.634 over the 30 ordered validation pairs, folding 0.025 %, after 360 steps in 53
minutes; not converged (experiments/results/lpba40_cpu.md). `:tiny` is a test of the plumbing.
"""

from ml_collections import ConfigDict, config_dict  # type: ignore[import-untyped]


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "batch_size": 0,
            "space": 1,  # devices that share each volume
            "accumulate": 1,  # parts that a batch is computed in, one after the other
            "remat": False,  # True: less memory, more time
            "bidirectional": True,
            "start_from": "",  # parameters to begin with: a bundle, or the workdir of a run
            "average": 0.0,  # of the running mean of the parameters, what is left after a step
            "total_steps": 360,
            "log_every": 10,
            "validate_every": 120,
            "checkpoint_every": 40,
            "validation_pairs": 6,
            "model": {
                "name": "voxelmorph",
                "options": {
                    "down": (16, 32, 32, 32),
                    "up": (32, 32, 32, 32),
                    "final": (32, 16, 16),
                    "dtype": "float32",
                },
            },
            "data": {
                "name": "lpba40",
                "directory": "../shared/data/lpba40",
                "options": {},
                "preprocessing": {"normalise": "max", "downsample": 2, "crop_to": config_dict.placeholder(tuple)},
                "cache": config_dict.placeholder(str),
                "workers": 0,
                "flips": (0,),
                "affine": (0.05, 0.02),
                "gamma": 0.0,
            },
            "loss": {
                "similarity": "lncc",
                "border": "cut",
                "finest": 0,
                "weights": (1.0,),
                "windows": (9,),
                "regulariser": "diffusion",
                "regulariser_weight": 2.0,
                "inverse_weight": 0.0,
                "foreground": False,
                "coarse_to_fine": 0.0,
            },
            "optimiser": {
                "learning_rate": 1e-3,
                "warmup_steps": 50,
                "schedule": "cosine",
                "clip": 1.0,
                "kind": "adam",
                "decay": 0.0,
            },
        }
    )
    if argument == "tiny":
        config.total_steps, config.log_every, config.validate_every, config.checkpoint_every = 4, 1, 4, 2
        config.validation_pairs = 1
        config.model.options.update({"down": (4, 4), "up": (4, 4), "final": (4,)})
        config.data.preprocessing.crop_to = (32, 32, 32)
        config.loss.windows = (5,)
        config.optimiser.warmup_steps = 1
    elif argument:
        raise ValueError(f"this configuration knows the argument 'tiny', not {argument!r}")
    return config
