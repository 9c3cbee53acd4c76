"""A pretended accelerator: runs code for GPUs on a CPU.

Its tensors claim to be on torch's meta device and keep their values on the CPU. As on a GPU,
tensors on different devices cannot be combined, and reading a value makes the host wait; each wait
is recorded. Kernels, streams, 16-bit formats, NCCL and pinned memory are not simulated: on a real
GPU a non-blocking copy of a large source that is not pinned may still wait.
"""

import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from snclr.running import devices, step_graph

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
        self.waits, self.captured, self.broken = [], None, False

    def __enter__(self):
        Accelerator.active = self
        # a dispatch mode does not see these
        self.own = torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist
        make, keep, _, read = self.own
        torch.tensor = lambda *args, device="cpu", **how: make(*args, **how).to(device)
        torch.as_tensor = lambda x, device="cpu", **how: keep(x, **how).to(device)
        torch.Tensor.new_tensor = lambda like, x: make(x, dtype=like.dtype).to(like.device)
        torch.Tensor.tolist = lambda x: read(x.cpu() if isinstance(x, Remote) else x)
        self.stand_ins = contextlib.ExitStack()
        for module, name, stand_in in (
            (devices, "has_graphs", lambda device: True),
            (step_graph, "has_graphs", lambda device: True),
            (step_graph, "on_stream", lambda function, stream: function()),
            (step_graph, "capture", self.capture),
            (step_graph, "noted_waits", self.noted_waits),
            (torch.cuda, "Stream", lambda device: None),
        ):
            self.stand_ins.enter_context(mock.patch.object(module, name, stand_in))
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist = self.own
        self.stand_ins.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.call(function, args, kwargs or {})

    def call(self, function, args, kwargs):
        assert not self.broken, "after a capture that failed, torch is not reliable"
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        remote = [isinstance(x, Remote) for x in tensors]
        asked = kwargs.get("device")
        wanted = any(remote) if asked is None else torch.device(asked) == DEVICE
        device = {"device": torch.device("cpu")} if asked is not None and wanted else {}
        local = to_host((args, {**kwargs, **device}))
        if self.captured is not None and (wanted or any(remote)):
            self.captured.append((function, *local, _written(function, *local)))
        out = function(*local[0], **local[1])
        if self.captured is not None and (wanted or any(remote)):
            self.captured[-1] += (out,)
        if name in ("_to_copy", "copy_"):
            here, there = remote[-1], remote[0] if name == "copy_" else wanted
            # a graph would copy from memory of the host that is used for something else by then
            at_once = self.captured is None and (kwargs.get("non_blocking") or args[2:] == (True,))
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

    def capture(self, function, stream):
        """In the place of snclr.running.step_graph.capture.

        As with a CUDA graph, the call changes nothing on the device, and each replay repeats its
        operations on the same memory, with the numbers that the host had in this call. After a
        capture that fails, nothing works any more.
        """
        self.captured, random, failed = [], torch.get_rng_state(), True
        try:
            outputs = function()
            failed = False
        finally:
            captured, self.captured = self.captured, None
            torch.set_rng_state(random)
            for *_, written, _ in reversed(captured):
                for x, before in written:
                    x.copy_(before)
            self.broken = failed

        def replay():
            for operation, args, kwargs, _, out in captured:
                again = operation(*args, **kwargs)
                for x, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(x, torch.Tensor) and x.data_ptr() != new.data_ptr():
                        x.copy_(new)

        return replay, outputs

    @contextlib.contextmanager
    def noted_waits(self):
        """In the place of snclr.running.step_graph.noted_waits."""
        before, waits = len(self.waits), []
        yield waits
        waits += self.waits[before:]

    def wait(self, name):
        if self.captured is not None:
            raise RuntimeError(f"{name} is not permitted when a stream is capturing")
        self.waits.append(f"{name}, {_place()}")


def _written(function, args, kwargs):
    """Pairs of the tensors that an operation will write, and copies of them as they are now."""
    names = [x.name for x in function._schema.arguments]
    by_name = dict(zip(names, args, strict=False)) | kwargs
    written = [x.name for x in function._schema.arguments if x.alias_info and x.alias_info.is_write]
    if "batch_norm" in function.overloadpacket.__name__:  # its schema does not say so
        written += ["running_mean", "running_var"]
    tensors = tree_leaves([by_name.get(name) for name in written])
    return [(x, x.clone()) for x in tensors if isinstance(x, torch.Tensor)]


def _place():
    """Lines of the project on the call stack, innermost first."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    ours = [
        f"{path.name}:{line}"
        for path, line in frames
        if path.parent == ROOT or ROOT / "snclr" in path.parents
    ]
    return " < ".join(reversed(ours[-3:]))
