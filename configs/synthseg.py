"""Dilformer for any contrast, trained on label maps alone: weights that may be given away.

Of 16 of the 20 label maps that SynthSeg distributes (Apache-2.0), as seg_*.nii.gz at 160x192x160 and 1 mm, images of
random contrast are made anew at every step (`dilformer_jax/data/synthesis.py`, after SynthMorph, Hoffmann et al., TMI
2022); the loss compares what they show, not how. The other four are validated on as T1-like images. Displacements live
at 1/2 to 1/16 of the resolution. Command:

    python -m dilformer_jax.train --config configs/synthseg.py --workdir runs/synthseg --config.data.directory=DIR

Cost: 36,000 steps of one pair a device, in both directions; 24 minutes of an H200. Expected, beginning with the weights
of 8,000 steps before these: Dice 0.795 of the validation maps' images, 0.277 before; on brains, none of which it has
seen, 0.708 of LPBA40's validation pairs, 0.522 before, and 0.630 of 12 pairs of IXI, 0.463 before, or 0.613 with the
moving image in another contrast (experiments/results/synthseg.md). Those weights ship with the package. `:tiny` is a
test of the plumbing.
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
            "average": 0.9995,  # of the running mean of the parameters, what is left after a step
            "total_steps": 36000,
            "log_every": 50,
            "validate_every": 36000,
            "checkpoint_every": 500,
            "validation_pairs": 4,
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
                    "smoothness": (0.25, 4.0),
                    "dtype": "float32",
                },
            },
            "data": {
                "name": "label_maps",
                "directory": "../shared/data/synthseg",
                "options": {
                    "validation": 4,
                    "synthesis": {  # what each means: data/synthesis.py; lengths in mm
                        "t1": 0.5,
                        "remapped": 0.6,
                        "shared_contrast": 0.15,
                        "without_below": 0.2,
                        "surroundings": 0.15,
                        "soft": 0.3,
                        "deformation": 9.0,
                        "controls": 10,
                        "texture": 0.08,
                        "noise": 0.05,
                        "blur": 1.2,
                        "thickness": 5.0,
                        "thick": 0.25,
                        "coarseness": 2.5,
                        "coarse": 0.2,
                        "bias": 1.2,
                        "gamma": 0.2,
                    },
                },
                "preprocessing": {
                    "normalise": "percentile",
                    "downsample": 1,
                    "crop_to": config_dict.placeholder(tuple),
                },
                "cache": "device",  # 16 label maps, 80 MB
                "workers": 0,
                "flips": (0,),
                "affine": (0.05, 0.02),
                "gamma": 0.0,
            },
            "loss": {
                "similarity": "lncc",
                "border": "cut",
                "finest": 1,
                "weights": (1.0, 0.5, 0.25),
                "windows": (7, 5, 3),
                "regulariser": "diffusion",
                "regulariser_weight": 1.0,
                "inverse_weight": 0.0,
                "foreground": False,
                "coarse_to_fine": 0.0,
                "label_count": 31,
                "label_weight": 2.0,
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
