"""The number of attention heads of the weights in a file, which no tensor shows."""

from ..choices import NUM_HEADS
from .layouts import EncoderFile

# attention heads in timm, DeiT and DINO, if NUM_HEADS has another number
LIBRARY_NUM_HEADS = {"vit_small": 6}


def choose_num_heads(
    file: EncoderFile, arch: str, num_heads: int | None
) -> tuple[int | None, list[str]]:
    """The number of attention heads for the weights of a file, and a line with the reason.

    No tensor shows this number. In this order it is: num_heads, if the caller chose one; that of
    the file's settings; for weights with a library's names that of the library's model; that of
    this project, the same as MoCo v3's. If arch has no such setting: num_heads and no line.
    """
    if arch not in NUM_HEADS:
        return num_heads, []
    if num_heads is not None:
        reason = "as --num-heads asks for"
    elif file.settings.get("num_heads") is not None:
        num_heads = file.settings["num_heads"]
        reason = f"as {file.path} has" if file.is_library else "as the file says"
    else:
        num_heads, source = NUM_HEADS[arch], "MoCo v3 and this project"
        if file.is_library:
            num_heads, source = LIBRARY_NUM_HEADS.get(arch, num_heads), "timm, DeiT and DINO"
        reason = f"as {arch} has in {source}; the file does not say it, --num-heads changes it"
    return num_heads, [f"{num_heads} attention heads, {reason}"]
