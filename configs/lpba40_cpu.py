"""Dilformer on LPBA40 at half resolution, for two CPU cores.

Trains on S11-S34 (552 ordered pairs), validates on ordered pairs of S35-S40; S01-S10 are the test set and are not
touched. The 160x192x160 images are averaged to 80x96x80, displacements live at 1/2 to 1/16 of that, the loss is
taken from 80x96x80 down. Labels are warped at full resolution. Command:

    python -m dilformer_jax.train --config configs/lpba40_cpu.py --workdir runs/lpba40_cpu --config.data.directory=DIR

Time: 46 minutes on two CPU cores, with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment. Expected: Dice
0.701 over the 30 pairs, 0.522 before (experiments/results/lpba40_cpu.md). `:tiny` is a test of the plumbing.
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
            "total_steps": 2400,
            "log_every": 10,
            "validate_every": 400,
            "checkpoint_every": 100,
            "validation_pairs": 6,
            "model": {
                "name": "dilformer",
                "options": {
                    "width": 16,
                    "levels": 4,
                    "finest": 1,
                    "recursions": 1,
                    "diffeomorphic": False,
                    "separate_encoders": False,
                    "msr": True,
                    "dilformer": "streams",
                    "srf": True,
                    "correlation": True,
                    "attention": "channels",
                    "heads": 4,
                    "window": (5, 6, 5),  # of attention "windows"
                    "dilations": (1, 2, 3),
                    "smoothness": (),
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
                "weights": (1.0, 0.5, 0.25, 0.125, 0.0625),
                "windows": (9, 7, 7, 5, 3),
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
        config.model.options.update({"width": 4, "levels": 2})
        config.data.preprocessing.crop_to = (32, 32, 32)
        config.loss.update({"weights": (1.0, 0.5), "windows": (5, 3)})
        config.optimiser.warmup_steps = 1
    elif argument:
        raise ValueError(f"this configuration knows the argument 'tiny', not {argument!r}")
    return config
