"""Dilformer on LPBA40 with the training brains' labels in the loss, for an accelerator.

Trains on S11-S34 and the 54 regions of their label maps, validates on ordered pairs of S35-S40, whose labels it never
sees; the published protocol's test subjects S01-S10 stay untouched. Images enter at full resolution, 160x192x160, by
a strided convolution; displacements and the loss live at 1/2 to 1/16 of it. Command:

    python -m dilformer_jax.train --config configs/lpba40_labels.py --workdir runs/labels --config.data.directory=DIR

Time: 7 minutes on one H100. Expected: Dice 0.758 over the 30 pairs, 0.522 before, 0.0075 % folded; with
`--config.loss.label_weight=0.0`, no labels, 6,000 steps and a running mean, 0.716 (experiments/results/lpba40.md).
`lpba40_diffeomorphic.py` goes on from it. `:tiny` is a test of the plumbing.
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
            "total_steps": 9000,
            "log_every": 50,
            "validate_every": 4500,
            "checkpoint_every": 500,
            "validation_pairs": 3,
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
                "preprocessing": {"normalise": "max", "downsample": 1, "crop_to": config_dict.placeholder(tuple)},
                "cache": "device",  # 24 volumes and their label maps, 0.6 GB
                "workers": 0,
                "flips": (0,),
                "affine": (0.05, 0.02),
                "gamma": 0.0,
            },
            "loss": {
                "similarity": "lncc",
                "border": "cut",
                "finest": 1,
                "weights": (1.0, 0.5, 0.25, 0.125),
                "windows": (9, 7, 7, 5),
                "regulariser": "diffusion",
                "regulariser_weight": 1.5,
                "inverse_weight": 0.0,
                "foreground": False,
                "coarse_to_fine": 0.0,
                "label_count": 54,
                "label_weight": 1.0,
            },
            "optimiser": {
                "learning_rate": 1e-3,
                "warmup_steps": 100,
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
