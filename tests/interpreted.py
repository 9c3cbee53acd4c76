"""Run --fused-augment's kernels by triton's interpreter: largest difference from the oracle.

python interpreted.py SIZE COUNT, with TRITON_INTERPRET=1 in the environment.
"""

import sys

import torch
from test_augment import EVERYTHING, MEAN, RECIPE, STD, apply_one_by_one, draw_many, pictures

from snclr import fused_augment

fused_augment.send = lambda x, device: x  # there is no GPU whose copies the host must not wait for
size, count = map(int, sys.argv[1:])
for views in (RECIPE.views[:1], RECIPE.views[1:], (EVERYTHING,)):
    crops = pictures(count, size).mul(255).round().to(torch.uint8)
    _, parameters = draw_many(RECIPE._replace(views=views), count=count)
    before = crops.clone()
    actual = fused_augment.apply(crops, parameters, MEAN, STD)
    assert torch.equal(crops, before)
    print((actual - apply_one_by_one(crops, parameters)).abs().max().item())
