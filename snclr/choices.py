"""The names that flags accept, and what belongs to a name. Imports nothing slow."""

from .running.errors import UsageError

METHODS = ("snclr", "nnclr", "mocov3", "mocov2")
FORMS = ("sum_of_logs", "log_of_sum")
CANDIDATES = ("all", "unique", "keys")
ARCHS = ("vit_tiny", "vit_small", "vit_base", "vit_conv_small", "vit_conv_base")
ARCHS += ("resnet8", "resnet18", "resnet34", "resnet50", "resnet101")
# attention heads; vit_small has 12 as in MoCo v3, while timm's, DeiT's and DINO's ViT-S has 6
NUM_HEADS = {
    "vit_tiny": 3,
    "vit_small": 12,
    "vit_base": 12,
    "vit_conv_small": 12,
    "vit_conv_base": 12,
}
OPTIMIZERS = {  # name: class, and its arguments besides the parameter groups and the learning rate
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "lars": ("snclr.optim.LARS", {}),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9, "fused": True}),
}
AMP = ("off", "auto", "bf16", "fp16")
COMPILE = ("auto", "off", "on", "graphs")
LOCAL_DATASETS = ("folder", "tree", "list", "shards")  # the user's own files
TORCHVISION_DATASETS = ("cifar10", "cifar100", "stl10", "svhn", "flowers102", "pets", "food101")
TORCHVISION_DATASETS += ("dtd", "aircraft")
DATASETS = ("embedded", *LOCAL_DATASETS, *TORCHVISION_DATASETS)
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
