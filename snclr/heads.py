"""Projector and predictor, the MLPs between backbone features and the objective, and the layers of
its attention.
"""

from torch import nn

from .running.batch_norm import GlobalBatchNorm


def mlp(layers: int, in_dim: int, hidden_dim: int, out_dim: int, last_norm: bool) -> nn.Sequential:
    """`layers` bias-free linear layers with batch norm and ReLU between; (B, in_dim) -> (B,
    out_dim).

    last_norm adds a batch norm without affine parameters at the end. Layer numbering is MoCo v3's.
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        width = out_dim if last else hidden_dim
        modules.append(nn.Linear(in_dim, width, bias=False))
        if not last:
            modules += [GlobalBatchNorm(width), nn.ReLU(inplace=True)]
        elif last_norm:
            modules.append(GlobalBatchNorm(width, affine=False))
        in_dim = width
    return nn.Sequential(*modules)


def projector(kind: str, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projector of a 'vit' (3 layers) or 'resnet' (2 layers): features (B, in_dim) -> projection
    (B, out_dim).
    """
    return mlp(3 if kind == "vit" else 2, in_dim, hidden_dim, out_dim, last_norm=True)


def predictor(kind: str, dim: int, hidden_dim: int) -> nn.Sequential:
    """Predictor, 2 layers: projection (B, dim) -> prediction (B, dim); a last norm for 'vit', none
    for 'resnet'.
    """
    return mlp(2, dim, hidden_dim, dim, last_norm=kind == "vit")


def plain_projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v2's projector (Chen et al. 2020), two layers with bias and no norm: (B, in_dim) -> (B,
    out_dim).
    """
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


class AttentionProjections(nn.Module):
    """The layers f1 and f2 of the paper's cross-attention, (dim -> dim) without bias: identities at
    the start, so that training starts from the plain cosine attention.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.f1, self.f2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.f1.weight)
        nn.init.eye_(self.f2.weight)
