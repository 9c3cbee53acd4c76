"""What a CPU and a GPU do differently."""

import torch
from torch import Tensor


def on_host(x: Tensor) -> bool:
    """Whether the host can read x without waiting.

    On a CPU it pays to skip rows that do not count. On a GPU all rows are multiplied, and these are
    masked afterwards.
    """
    return x.device.type == "cpu"


def has_graphs(device: torch.device) -> bool:
    """Whether a sequence of kernels can be recorded there, to be launched as one (a CUDA graph)."""
    return device.type == "cuda"


def send(x: Tensor, device: torch.device) -> Tensor:
    """x, from the host's memory, on the device. The host does not wait for the copy, as it would if
    a GPU copied from pageable memory.
    """
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def uses_bfloat16_bank(amp: str, device: torch.device) -> bool:
    """Whether the large products with the bank are computed in bfloat16: only on a CPU, and with
    --amp bf16. A GPU rounds each product before a search can subtract its offset
    (memory_bank.MemoryBank.search), and so loses neighbours; there float32 was not slower.
    """
    return amp == "bf16" and device.type == "cpu"
