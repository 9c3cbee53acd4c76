"""What an export consists of."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

PACKAGES = ("onnxruntime", "safetensors.torch", "timm", "torch", "torchvision", "transformers")


def packages_of(code: str) -> list[str]:
    """The names of PACKAGES that Python code uses and must import."""
    return [package for package in PACKAGES if f"{package}." in code]


class Export(NamedTuple):
    """What a library reads. build, read and hint get the path of the written file or folder.

    content   the state dict, or a dictionary that holds it, as the library expects it in the file;
              or the bytes of the file
    build     returns Python code that builds the library's model as `model`
    read      returns that model, or a function: images (B, C, S, S) to features (B, F)
    configs   contents of the JSON files beside the weights, by name; None if one file is written
    hint      returns one more line that helps the user of the file
    features  Python code: the features of `images` (B, C, S, S), from `model`
    """

    content: dict | bytes
    build: Callable[[str], str]
    read: Callable[[str], Callable[[Tensor], Tensor]]
    configs: dict[str, dict] | None = None
    hint: Callable[[str], str] | None = None
    features: str = "model.eval()(images)"

    def line(self, path: str) -> str:
        """One line of Python that imports what it needs, and builds the model."""
        build = self.build(path)
        return f"import {', '.join(packages_of(build))}; {build}"
