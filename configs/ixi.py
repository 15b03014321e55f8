"""Dilformer on IXI, atlas to subject, as in the paper (Peng et al. 2026): TransMorph's preprocessed set, 160x192x224.

`IXI_data/` as published with TransMorph: atlas.pkl, Train/ (403), Val/ (58) and Test/ (115) subject_<id>.pkl. The
atlas is the moving image. Command:

    python -m dilformer_jax.train --config configs/ixi.py --workdir runs/ixi --config.data.directory=IXI_data

Published for this network: Dice 0.769, HD95 8.937, negative Jacobian 0.029, 0.29 s a pair. The definitions of the
second and third are not published: they are nothing to tune to. Not run here, where the set is not at hand. `:tiny`
tests the plumbing.
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
            "bidirectional": False,
            "total_steps": 80600,
            "log_every": 100,
            "validate_every": 2000,
            "checkpoint_every": 1000,
            "validation_pairs": 0,
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
                "name": "ixi",
                "directory": "../IXI_data",
                "options": {},
                "preprocessing": {"normalise": "none", "downsample": 1, "crop_to": config_dict.placeholder(tuple)},
                "cache": config_dict.placeholder(str),
                "workers": 0,
                "flips": (0, 1, 2),
                "affine": (0.0, 0.0),
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
