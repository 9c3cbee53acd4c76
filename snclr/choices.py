"""The names that flags accept, and what belongs to a name. Imports nothing slow."""

import argparse
import os

from .running.errors import UsageError

METHODS = ("snclr", "nnclr", "mocov3", "mocov2")
FORMS = ("sum_of_logs", "log_of_sum")
CANDIDATES = ("all", "unique", "keys")
# settings without effect: where there are no soft neighbours, and of the objective by method
OF_NEIGHBOURS = ("form", "weights", "gamma", "nn_mass", "normalise_positives", "positiveness_t")
OF_NEIGHBOURS += ("detach_weights", "threshold", "candidates", "mix_neighbours", "nn_ramp_epochs")
UNUSED = {
    "nnclr": ("topk", *OF_NEIGHBOURS, "snclr_m", "snclr_m_cos"),
    "mocov3": ("topk", *OF_NEIGHBOURS, "bank_size", "exclude_own_image", "nn_warmup_epochs"),
    "mocov2": ("topk", *OF_NEIGHBOURS, "exclude_own_image", "nn_warmup_epochs"),
}
# attention heads; vit_small has 12 as in MoCo v3, while timm's, DeiT's and DINO's ViT-S has 6
NUM_HEADS = {
    "vit_tiny": 3,
    "vit_small": 12,
    "vit_base": 12,
    "vit_conv_small": 12,
    "vit_conv_base": 12,
}
ARCHS = (*NUM_HEADS, "resnet8", "resnet18", "resnet34", "resnet50", "resnet101")
OPTIMIZERS = {  # name: class, and its arguments besides the parameter groups and the learning rate
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "lars": ("snclr.optim.LARS", {}),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9, "fused": True}),
}
LOGGERS = ("wandb", "mlflow")  # names of libraries
PUBLIC = ("timm:", "hf:")  # --init-from: weights that timm or the Hugging Face hub has
AMP = ("off", "auto", "bf16", "fp16")
TOKENS = ("class", "mean", "patch")  # features of an image that snclr.embed writes
COMPILE = ("auto", "off", "on", "graphs")
LOCAL_DATASETS = ("folder", "tree", "list", "shards")  # the user's own files
TORCHVISION_DATASETS = ("cifar10", "cifar100", "stl10", "svhn", "flowers102", "pets", "food101")
TORCHVISION_DATASETS += ("dtd", "aircraft")
DATASETS = ("embedded", *LOCAL_DATASETS, "hf", *TORCHVISION_DATASETS)
# the encoder's input in pixels; 224 for all other data sets
IMG_SIZES = {"embedded": 32, "cifar10": 32, "cifar100": 32, "svhn": 32, "stl10": 96}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# mean and standard deviation of the channels, as commonly used; IMAGENET for all other data sets
# (`python -m snclr.mean_std` measures those of a data set)
MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "embedded": ((0.587, 0.587, 0.587), (0.171, 0.171, 0.171)),
}


def check_num_heads(num_heads: int | None, arch: str) -> None:
    """Raise UsageError for a number of attention heads if the architecture has no choice of it."""
    if num_heads is not None and arch not in NUM_HEADS:
        hint = "; use --timm-kwargs num_heads=N" if arch.startswith("timm:") else ""
        raise UsageError(f"--num-heads is for {', '.join(NUM_HEADS)}, not for {arch}{hint}")


def dataset_kind(text: str) -> str:
    """An argparse type: one of DATASETS, or hf:NAME, which names the data as well."""
    if text not in DATASETS and not text.startswith("hf:"):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(DATASETS)}, hf:NAME_OR_PATH)"
        )
    return text


def recognise_dataset(data: str | None) -> str:
    """The kind of DATA, one of DATASETS, from its name and the entries of its folder."""
    if data is None:
        return "embedded"
    if data.startswith("hf:"):
        return "hf"
    if os.path.isfile(data):
        kinds = {".tar": "shards", ".zip": "shards", ".txt": "list"}
        return kinds.get(os.path.splitext(data)[1].lower(), "folder")
    train = os.path.join(data, "train")
    root = train if os.path.isdir(train) else data
    entries = list(os.scandir(root)) if os.path.isdir(root) else []
    suffixes = {os.path.splitext(entry.name)[1].lower() for entry in entries}
    if ".tar" in suffixes or (".zip" in suffixes and suffixes <= {".zip", ".npz"}):
        return "shards"  # an .npz is their index
    if ".parquet" in suffixes and suffixes <= {".parquet", ".md", ""}:
        return "hf"
    has_classes = root == train and any(entry.is_dir() for entry in entries)
    # a missing folder counts as one with classes, and resolve_data refuses it as such
    return "folder" if has_classes or not os.path.isdir(data) else "tree"
