"""A pretended accelerator: runs code for GPUs on a CPU.

Its tensors claim to be on torch's meta device and keep their values on the CPU. As on a GPU,
tensors on different devices cannot be combined, and reading a value makes the host wait; each wait
is recorded. Kernels, streams, 16-bit formats, NCCL and pinned memory are not simulated: on a real
GPU a non-blocking copy of a large source that is not pinned may still wait.
"""

import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("meta")
# operations for which the host needs the values
LOOKS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "repeat_interleave",
    "_linalg_svd",
}
LOOKS |= {"_unique2", "unique_dim", "unique_consecutive"}


class Remote(torch.Tensor):
    """A tensor on the accelerator; `local` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, local):
        layout = dict(
            dtype=local.dtype,
            strides=local.stride(),
            storage_offset=local.storage_offset(),
            device=DEVICE,
        )
        return torch.Tensor._make_wrapper_subclass(
            cls, local.shape, requires_grad=local.requires_grad, **layout
        )

    def __init__(self, local):
        self.local = local

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Accelerator.active.call(function, args, kwargs or {})


def to_host(tree):
    """The same with all tensors on the CPU."""
    return tree_map_only(Remote, lambda x: x.local, tree)


class Accelerator(TorchDispatchMode):
    """A mode in which tensors can be put onto DEVICE. waits: lines where the host waited for it."""

    active = None

    def __init__(self):
        super().__init__()
        self.waits = []

    def __enter__(self):
        Accelerator.active = self
        # a dispatch mode does not see these
        self.own = torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist
        make, keep, _, read = self.own
        torch.tensor = lambda *args, device="cpu", **how: make(*args, **how).to(device)
        torch.as_tensor = lambda x, device="cpu", **how: keep(x, **how).to(device)
        torch.Tensor.new_tensor = lambda like, x: make(x, dtype=like.dtype).to(like.device)
        torch.Tensor.tolist = lambda x: read(x.cpu() if isinstance(x, Remote) else x)
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist = self.own
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.call(function, args, kwargs or {})

    def call(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        remote = [isinstance(x, Remote) for x in tensors]
        asked = kwargs.get("device")
        wanted = any(remote) if asked is None else torch.device(asked) == DEVICE
        device = {"device": torch.device("cpu")} if asked is not None and wanted else {}
        out = function(*to_host(args), **to_host({**kwargs, **device}))
        if name in ("_to_copy", "copy_"):
            here, there = remote[-1], remote[0] if name == "copy_" else wanted
            at_once = kwargs.get("non_blocking") or args[2:] == (True,)
            if (here and not there) or (there and not here and not at_once):
                self.wait(name)
            return args[0] if name == "copy_" else Remote(out) if wanted else out
        indices = args[1] if name in ("index", "index_put_") else ()
        if any(remote) and (
            name in LOOKS or any(x is not None and x.dtype == torch.bool for x in indices)
        ):
            self.wait(name)
        numbers = name not in ("stack", "cat", "where")  # elsewhere a number may come from the host
        for x, is_remote in zip(tensors, remote, strict=True):
            assert is_remote or not any(remote) or (numbers and not x.ndim), (
                f"{name} of tensors on two devices, {_place()}"
            )
        if not wanted:
            return out
        out = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Remote) else Remote(x), out)
        return return_and_correct_aliasing(function, args, kwargs, out)

    def wait(self, name):
        self.waits.append(f"{name}, {_place()}")


def _place():
    """Lines of the project on the call stack, innermost first."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    ours = [
        f"{path.name}:{line}"
        for path, line in frames
        if path.parent == ROOT or ROOT / "snclr" in path.parents
    ]
    return " < ".join(reversed(ours[-3:]))
