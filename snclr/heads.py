"""The heads: projector and predictor, and the layers of the paper's attention."""

from torch import nn

from .running.batch_norm import GlobalBatchNorm


def mlp(layers: int, in_dim: int, hidden_dim: int, out_dim: int, last_norm: bool) -> nn.Sequential:
    """(B, in_dim) -> (B, out_dim): linear layers without bias, with batch norm and ReLU in between.

    last_norm adds a batch norm without affine parameters at the end. Layers are numbered as in
    MoCo v3.
    """
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [
            nn.Linear(in_dim, hidden_dim, bias=False),
            GlobalBatchNorm(hidden_dim),
            nn.ReLU(inplace=True),
        ]
        in_dim = hidden_dim
    modules.append(nn.Linear(in_dim, out_dim, bias=False))
    if last_norm:
        modules.append(GlobalBatchNorm(out_dim, affine=False))
    return nn.Sequential(*modules)


def projector(kind: str, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Features (B, in_dim) -> projection (B, out_dim): 3 layers for kind 'vit', 2 for 'resnet'."""
    return mlp(3 if kind == "vit" else 2, in_dim, hidden_dim, out_dim, last_norm=True)


def predictor(kind: str, dim: int, hidden_dim: int) -> nn.Sequential:
    """Projection (B, dim) -> prediction (B, dim): 2 layers; kind 'vit' has a last norm."""
    return mlp(2, dim, hidden_dim, dim, last_norm=kind == "vit")


def plain_projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v2's projector (Chen et al. 2020): 2 layers with bias, no norm."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


class AttentionProjections(nn.Module):
    """The layers f1 and f2 of the paper's cross-attention, (dim -> dim) without bias.

    They start as identities, so that training starts from attention by plain cosines.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.f1, self.f2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.f1.weight)
        nn.init.eye_(self.f2.weight)
