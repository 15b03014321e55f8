"""What the benchmark sets against this package: the same work in PyTorch, and the official PyTorch networks.

The networks are loaded from clones of their public repositories, given by path; none of their code is here:
RDP https://github.com/ZAX130/RDP, VoxelMorph https://github.com/voxelmorph/voxelmorph, TransMorph
https://github.com/junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration. Weights are random: only time
and memory are looked at. Everything runs on the CUDA device where PyTorch has one; a run ends when its work has ended.
"""

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, int, int]
Run = Callable[[], Any]
NETWORKS = ("rdp", "voxelmorph", "transmorph")


def available() -> bool:
    """Whether PyTorch (the `torch` extra) is installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def version() -> str:
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"{torch.__version__} ({where})"


def finished(run: Run) -> Run:
    """The run, waiting for the GPU's queue to empty, as the time of a run includes its work."""
    import torch

    def whole() -> Any:
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return whole


def release() -> None:
    """Gives the memory of a network that is no longer needed back to the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tensor(array: Any) -> Any:
    """(b, d, h, w, c) to PyTorch's (b, c, d, h, w), contiguous, on its device."""
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy()).to(device())


def _forward(function: Callable, *operands: Any) -> Run:
    import torch

    def run() -> Any:
        with torch.no_grad():
            return function(*operands)

    return finished(run)


def _with_gradients(function: Callable, operands: tuple, variables: tuple[int, ...]) -> Run:
    """The sum of squares and its gradients, as the benchmark has it for this package."""
    import torch

    for index in variables:
        operands[index].requires_grad_()
    wanted = [operands[index] for index in variables]
    return finished(lambda: torch.autograd.grad(function(*operands).square().sum(), wanted))


# --- Primitives ---


def convolution(x: Any, kernel: Any, *, stride: int = 1, dilation: int = 1, gradients: bool = False) -> Run:
    """`ops.conv`'s dense, axis-wise and (with a kernel of four axes) depthwise convolutions."""
    import torch

    depthwise = kernel.ndim == 4
    places = np.moveaxis(kernel, -1, 0)[:, None] if depthwise else np.transpose(kernel, (4, 3, 0, 1, 2))
    weight, groups = torch.from_numpy(np.ascontiguousarray(places)), kernel.shape[-1] if depthwise else 1
    operands = tensor(x), weight.to(device())
    # With stride 2 an even kernel is centred between voxels, one of 3 on the even ones (padded in front alone here).
    reach = [dilation * ((size - 1) // 2) for size in kernel.shape[:3]]
    function = lambda x, weight: torch.nn.functional.conv3d(
        x, weight, stride=stride, padding=reach, dilation=dilation, groups=groups
    )
    return _with_gradients(function, operands, (0, 1)) if gradients else _forward(function, *operands)


def sampling(image: Any, displacement: Any, variables: tuple[int, ...] = ()) -> Run:
    """`grid_sample` alone: the displacement (1, d, h, w, 3) in voxels becomes its normalised grid beforehand."""
    import torch

    shape = np.array(displacement.shape[1:4])
    index = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    grid = 2 * (index + np.asarray(displacement)) / (shape - 1) - 1
    operands = tensor(image), torch.from_numpy(grid[..., ::-1].astype(np.float32).copy()).to(device())
    function = lambda image, grid: torch.nn.functional.grid_sample(
        image, grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return _with_gradients(function, operands, variables) if variables else _forward(function, *operands)


def ncc(fixed: Any, moved: Any, window: int = 9) -> Any:
    """The similarity as VoxelMorph, RDP and TransMorph compute it: five convolutions with a window of ones."""
    import torch

    ones = torch.ones(1, 1, window, window, window, dtype=fixed.dtype, device=fixed.device)
    total = lambda x: torch.nn.functional.conv3d(x, ones, padding=window // 2)
    sum_f, sum_m, count = total(fixed), total(moved), window**3
    cross = total(fixed * moved) - sum_f * sum_m / count
    variance_f = total(fixed * fixed) - sum_f * sum_f / count
    variance_m = total(moved * moved) - sum_m * sum_m / count
    return (cross * cross / (variance_f * variance_m + 1e-5)).mean()


def similarity(fixed: Any, moved: Any, window: int) -> Run:
    """`ncc` with its gradient to the moved image."""
    import torch

    fixed, moved = tensor(fixed), tensor(moved).requires_grad_()
    return finished(lambda: torch.autograd.grad(ncc(fixed, moved, window), [moved]))


def integration(velocity: Any, steps: int) -> Run:
    """Scaling and squaring of a velocity (1, d, h, w, 3) as VoxelMorph has it."""
    import torch

    shape = velocity.shape[1:4]
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in shape), indexing="ij")
    grid = torch.stack(axes)[None].to(device())
    scale = torch.tensor([2 / (size - 1) for size in shape], device=device()).view(1, 3, 1, 1, 1)

    def integrate(u: Any) -> Any:
        u = u / 2**steps
        for _ in range(steps):
            places = ((grid + u) * scale - 1).permute(0, 2, 3, 4, 1).flip(-1)
            u = u + torch.nn.functional.grid_sample(u, places, padding_mode="border", align_corners=True)
        return u

    return _forward(integrate, tensor(velocity))


# --- Networks ---


def network(name: str, clone: Path, shape: Shape) -> tuple[Any, Callable]:
    """An official network with its published widths, and the function (moving, fixed) to (moved, displacement)."""
    import torch

    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "torch.meshgrid")
    if name == "rdp":
        with _importing(clone):
            module = importlib.import_module("models").RDP(shape, channels=16)
    elif name == "voxelmorph":
        # Its package's __init__ wants neurite and a backend; its network needs neither.
        package = types.ModuleType("voxelmorph")
        package.__path__ = [str(clone / "voxelmorph")]
        package.default_unet_features = lambda: [[16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16]]  # type: ignore[attr-defined]
        with _importing(clone, {"voxelmorph": package}):
            module = importlib.import_module("voxelmorph.torch.networks").VxmDense(shape, int_steps=7, int_downsize=2)
    elif name == "transmorph":
        with _importing(clone / "TransMorph", _timm()):
            official = importlib.import_module("models.TransMorph")
            config = official.CONFIGS["TransMorph"]
            # Its patches are 4³; the published window for 160x192x224 is a seventh or eighth of what is left.
            config.img_size, config.window_size = shape, tuple(max(size // 32, 2) for size in shape)
            module = official.TransMorph(config)
    else:
        raise ValueError(f"A peer is one of {NETWORKS}, got {name!r}.")
    module = module.to(device())
    if name == "transmorph":
        return module, lambda moving, fixed: module(torch.cat([moving, fixed], dim=1))
    return module, module


@contextlib.contextmanager
def _importing(folder: Path, stand_ins: Mapping[str, types.ModuleType] | None = None) -> Iterator[None]:
    """Imports from a clone's folder, whose modules have names as general as 'models'."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no clone at {folder}.")
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.modules.update(stand_ins or {})
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "voxelmorph", "timm"):
                del sys.modules[name]


def _timm() -> dict[str, types.ModuleType]:
    """The three names that TransMorph takes from timm, where that is not installed."""
    import torch

    class DropPath(torch.nn.Module):
        """Stochastic depth: a residual path left out for some examples while training."""

        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, x: Any) -> Any:
            if not self.training:
                return x
            kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
            return x * kept / (1 - self.rate)

    names = {"timm": {}, "timm.models": {}, "timm.models.layers": {
        "DropPath": DropPath,
        "trunc_normal_": torch.nn.init.trunc_normal_,
        "to_3tuple": lambda x: x if isinstance(x, tuple) else (x, x, x),
    }}  # fmt: skip
    modules = {name: types.ModuleType(name) for name in names}
    for name, members in names.items():
        vars(modules[name]).update(members)
    return modules


def inference(name: str, clone: Path, fixed: Any, moving: Any, dtype: str = "float32") -> Run:
    """A pair to its displacement and moved image, without gradients."""
    import torch

    module, apply = network(name, clone, fixed.shape[1:4])
    module.eval()
    operands = tensor(moving), tensor(fixed)

    def run() -> Any:
        with torch.inference_mode(), _autocast(dtype):
            return apply(*operands)

    return finished(run)


def training_step(name: str, clone: Path, fixed: Any, moving: Any, dtype: str = "float32") -> Run:
    """A step of the published training: -NCC 9³ + the squared gradient of the displacement, Adam with amsgrad."""
    import torch

    module, apply = network(name, clone, fixed.shape[1:4])
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4, amsgrad=True)
    moving, fixed = tensor(moving), tensor(fixed)

    def run() -> Any:
        optimiser.zero_grad()
        with _autocast(dtype):
            moved, displacement = apply(moving, fixed)[:2]
        u = displacement.float()
        smooth = sum((torch.diff(u, dim=axis).square().mean() for axis in (2, 3, 4)), torch.zeros((), device=u.device))
        loss = smooth / 3 - ncc(fixed, moved.float())
        loss.backward()
        optimiser.step()
        return loss

    return finished(run)


def _autocast(dtype: str) -> Any:
    import torch

    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
