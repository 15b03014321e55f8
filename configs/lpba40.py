"""Dilformer on LPBA40 as in the paper: full resolution, 160x192x160, for an accelerator (Peng et al. 2026).

Trains on S11-S34, validates on ordered pairs of S35-S40; the published protocol's test subjects S01-S10 stay
untouched. Command:

    python -m dilformer_jax.train --config configs/lpba40.py --workdir runs/lpba40 --config.data.directory=DIR

Cost: 26,100 steps of one pair a device. Not yet run to its end: no number is claimed. `:tiny` is a test of the
plumbing.
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
            "total_steps": 26100,
            "log_every": 50,
            "validate_every": 1000,
            "checkpoint_every": 500,
            "validation_pairs": 6,
            "model": {
                "name": "dilformer",
                "options": {
                    "width": 16,
                    "levels": 4,
                    "finest": 0,
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
                "preprocessing": {"normalise": "max", "downsample": 1, "crop_to": config_dict.placeholder(tuple)},
                "cache": "device",  # 24 volumes, 0.5 GB
                "workers": 0,
                "flips": (0,),
                "affine": (0.05, 0.02),
                "gamma": 0.0,
            },
            "loss": {
                "similarity": "lncc",
                "border": "cut",
                "finest": 0,
                "weights": (1.0, 0.5, 0.25, 0.125),
                "windows": (9, 7, 5, 3),
                "regulariser": "diffusion",
                "regulariser_weight": 1.0,
                "inverse_weight": 0.0,
                "foreground": False,
                "coarse_to_fine": 0.0,
            },
            "optimiser": {
                "learning_rate": 5e-4,
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
