"""Dilformer on the built-in phantom brains: what `make demo` trains, in a few minutes on two CPU cores.

24 phantoms to train, 6 to validate, 64x80x64 voxels, made from a seed. Command:

    python -m dilformer_jax.train --config configs/demo.py --workdir runs/demo

Expected: mean Dice of the 30 ordered validation pairs from 0.511 to 0.722 (experiments/results/demo.md). With
`:tiny`, a few steps of a small network on small phantoms: a test of the plumbing that learns nothing.
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
            "total_steps": 450,
            "log_every": 10,
            "validate_every": 150,
            "checkpoint_every": 50,
            "validation_pairs": 10,
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
                "name": "phantoms",
                "directory": "runs/phantoms",
                "options": {"train": 24, "validation": 6, "shape": (64, 80, 64), "seed": 0},
                "preprocessing": {"normalise": "max", "downsample": 1},
                "cache": config_dict.placeholder(str),
                "workers": 0,
                "flips": (),
                "affine": (0.0, 0.0),
                "gamma": 0.0,
            },
            "loss": {
                "similarity": "lncc",
                "border": "cut",
                "finest": 0,
                "weights": (1.0, 0.5, 0.25, 0.125, 0.0625),
                "windows": (9, 7, 7, 5, 3),
                "regulariser": "diffusion",
                "regulariser_weight": 1.0,
                "inverse_weight": 0.0,
                "foreground": False,
                "coarse_to_fine": 0.0,
            },
            "optimiser": {
                "learning_rate": 2e-3,
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
        config.data.options.update({"train": 2, "validation": 2, "shape": (32, 32, 32)})
        config.loss.update({"weights": (1.0, 0.5), "windows": (5, 3)})
        config.optimiser.warmup_steps = 1
    elif argument:
        raise ValueError(f"this configuration knows the argument 'tiny', not {argument!r}")
    return config
