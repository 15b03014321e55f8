"""The diffeomorphic form of a network that was trained by lpba40_labels.py: its last steps, with velocities.

What its heads give is taken for velocities, which are integrated: the same parameters, which a few hundred steps adapt.
The labels of S11-S34 are in the loss; S35-S40 are validated on, S01-S10 stay untouched. Command:

    python -m dilformer_jax.train --config configs/lpba40_diffeomorphic.py --workdir runs/diffeomorphic \
        --config.data.directory=DIR

It begins with the parameters in runs/labels. Time: a minute on one H100, most of it compilation. Expected: Dice 0.760
over the 30 pairs, 0.522 before, no voxel folded, where runs/labels are those 9,000 steps and 4,000 more
(experiments/results/lpba40.md has the commands; those weights: experiments/lpba40). `:tiny` is a test of the plumbing.
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
            "start_from": "runs/labels",  # parameters to begin with: a bundle, or the workdir of a run
            "average": 0.99,  # of the running mean of the parameters, what is left after a step
            "total_steps": 500,
            "log_every": 50,
            "validate_every": 500,
            "checkpoint_every": 250,
            "validation_pairs": 3,
            "model": {
                "name": "dilformer",
                "options": {
                    "width": 16,
                    "levels": 4,
                    "finest": 1,
                    "recursions": 1,
                    "diffeomorphic": True,
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
                "learning_rate": 3e-4,
                "warmup_steps": 20,
                "schedule": "cosine",
                "clip": 1.0,
                "kind": "adam",
                "decay": 0.0,
            },
        }
    )
    if argument == "tiny":
        config.start_from = ""
        config.total_steps, config.log_every, config.validate_every, config.checkpoint_every = 4, 1, 4, 2
        config.validation_pairs = 1
        config.model.options.update({"width": 4, "levels": 2})
        config.data.preprocessing.crop_to = (32, 32, 32)
        config.loss.update({"weights": (1.0, 0.5), "windows": (5, 3)})
        config.optimiser.warmup_steps = 1
    elif argument:
        raise ValueError(f"this configuration knows the argument 'tiny', not {argument!r}")
    return config
