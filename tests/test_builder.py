"""Whole training steps of the model: MoCo v2's keys, and local views against an oracle."""

import math

import pytest
import torch
from torch import nn

from snclr import builder, heads, options
from snclr.builder import SNCLR
from snclr.memory_bank import MemoryBank

BANK, DIM = 64, 16


class Encoder(nn.Module):
    """Vectors (B, DIM) through a batch norm and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 32), nn.ReLU())
        self.projector = heads.plain_projector(32, 32, DIM)

    def embed(self, x):
        return self.body(x)


def mocov2():
    torch.manual_seed(0)
    args = options.parse(["--method", "mocov2", "--snclr-t", "0.2"])
    return SNCLR(Encoder(), None, MemoryBank(BANK, DIM), args).train()


# -- MoCo v2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("leak", [True, False])
def test_batch_statistics_in_the_keys_would_make_mocov2_trivial_and_averaged_ones_do_not(leak):
    """Image 0 of each batch is bright; all others are noise, independent in both views. The noise
    carries the batch's statistics after a batch norm, and nothing else that its views share."""
    model = mocov2()
    if leak:
        model.momentum_encoder.train()
    optimizer, losses = torch.optim.Adam(model.base_encoder.parameters(), 3e-3), []
    for step in range(300):
        views = list(torch.randn(2, 16, DIM))
        views[0][0] = views[1][0] = 30 * (torch.randint(0, 2, (DIM,)) * 2 - 1)
        loss, shown = model(views, torch.arange(16) + 16 * step, 0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert shown.num_candidates == BANK + 1
    ratio = sum(losses[-60:]) / 60 / math.log(BANK + 1)
    # image 0 may be recognised: 15/16 of the chance level are left at best
    assert ratio < 0.6 if leak else ratio > 0.85


def test_a_key_of_mocov2_depends_on_its_own_image_only():
    model, x = mocov2(), 3 * torch.randn(8, DIM) + 1
    for step in range(5):
        model([x + step, x - step], torch.arange(8), 0.9)
    before = [buffer.clone() for buffer in model.momentum_encoder.buffers()]
    (keys,) = model._momentum_projections(1.0, [x])
    alone = [model._momentum_projections(1.0, [image[None]])[0] for image in x]
    torch.testing.assert_close(keys, torch.cat(alone))
    for buffer, old in zip(model.momentum_encoder.buffers(), before, strict=True):
        assert torch.equal(buffer, old)


def test_statistics_of_mocov2s_keys_are_averages_of_those_before_this_batch():
    model, x = mocov2(), 3 * torch.randn(8, DIM) + 1
    model([x, x], torch.arange(8), 0.9)
    online, average = model.base_encoder.body[0], model.momentum_encoder.body[0]
    assert not average.running_mean.any()  # the first batch was not yet known to its own keys
    known = online.running_mean.clone(), online.running_var.clone()
    model([x, x], torch.arange(8), 0.9)
    torch.testing.assert_close(average.running_mean, 0.1 * known[0])
    torch.testing.assert_close(average.running_var, 0.9 + 0.1 * known[1])


def test_mocov2_has_a_plain_projector_and_its_own_views():
    args = options.parse(["--method", "mocov2", "--snclr-mlp-dim", "24", "--snclr-dim", "8"])
    model = builder.build_model(args)
    width = model.base_encoder.num_features
    for encoder in (model.base_encoder, model.momentum_encoder):
        kinds = [type(layer) for layer in encoder.projector]
        assert kinds == [nn.Linear, nn.ReLU, nn.Linear]
        shapes = [tuple(p.shape) for p in encoder.projector.parameters()]
        assert shapes == [(24, width), (24,), (8, 24), (8,)]
        assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 8)
    assert not model.train().momentum_encoder.training and model.base_encoder.training
