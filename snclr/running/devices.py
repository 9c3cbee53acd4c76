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


def bank_products(amp: str, device: torch.device) -> str:
    """In what the large products with the bank are computed: 'float32', 'bfloat16' or 'tf32'.

    In 16 bits a GPU would round each product before a search can subtract its offset
    (memory_bank.MemoryBank.search), and so lose neighbours. TF32 rounds only the factors, to 11
    bits, and needs no second copy of the bank.
    """
    if device.type == "cpu":
        return "bfloat16" if amp == "bf16" else "float32"
    return "float32" if amp == "off" else "tf32"
