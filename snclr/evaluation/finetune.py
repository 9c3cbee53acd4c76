"""Fine-tuning of an encoder with a linear classifier on top: the model, its parameter groups, and raw pixels to compare."""

import timm.optim
import torch
from torch import Tensor, nn

from ..optim import parameter_groups
from ..running.errors import UsageError

# optimiser: peak rates of encoder and head for a batch of 256, weight decay
DEFAULTS = {"sgd": (0.02, 0.2, 0.0), "adamw": (5e-4, 5e-3, 0.05)}
FROM_SCRATCH = {
    "sgd": (0.1, 0.1, 5e-4),
    "adamw": (5e-4, 5e-4, 0.05),
}  # where the encoder has learned nothing yet


class Classifier(nn.Module):
    """An encoder and a linear layer, which starts as N(0, 0.01): images (B, 3, S, S) to logits (B, classes)."""

    def __init__(self, encoder: nn.Module, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.embed(x))


class Pixels(nn.Module):
    """The pixels themselves as features, flattened: what any encoder has to beat."""

    def __init__(self, img_size: int):
        super().__init__()
        self.num_features = 3 * img_size**2

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 3 * S * S)."""
        return x.flatten(1)


def build_optimizer(
    model: Classifier, name: str, lr: float, head_lr: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """'sgd' (momentum 0.9) or 'adamw'; each group's 'peak' is its rate before the schedule, lr of the encoder or head_lr.

    layer_decay: the rate falls by this factor from each layer to the one before it (timm's grouping); 1: none.
    """
    if layer_decay == 1:
        groups = parameter_groups(model.encoder.named_parameters(), weight_decay)
    elif hasattr(model.encoder, "group_matcher"):
        groups = timm.optim.param_groups_layer_decay(
            model.encoder, weight_decay, layer_decay=layer_decay
        )
    else:
        raise UsageError(f"--layer-decay {layer_decay} is for ViTs and timm's models: leave it out")
    groups = [{**group, "peak": lr * group.pop("lr_scale", 1.0)} for group in groups]
    head = parameter_groups(model.head.named_parameters(), weight_decay)
    groups += [{**group, "peak": head_lr} for group in head]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
