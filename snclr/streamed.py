"""The log-sum-exp over all candidates of the contrastive losses, in one pass over the bank."""

import math

import torch
from torch import Tensor

from .running.devices import on_host
from .running.precision import tf32

# logits computed at a time: on a CPU they stay in a core's cache, on a GPU they fill it
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
# Lowest temperature at which exp(logit - 1/T), at least exp(-2/T), is a normal float32.
LOWEST_TEMPERATURE = 0.025
SPLITS = 64  # on a GPU, at most so many products replace the one over all candidates


def log_sum_exp(
    query: Tensor,
    keys: Tensor,
    bank: Tensor,
    counts: Tensor,
    temperature: float,
    *,
    tf32_products: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """log( sum_n exp(q_i . keys_n / T) + sum_m counts_m exp(q_i . bank_m / T) ), (B,).

    query (B, D)    unit rows, with gradient; keys, bank and counts get none
    keys (N, D)     counted once each
    bank (M, D)     in bfloat16, the products are taken in that format, maxima and sums in query's
    counts (M,)     non-negative integers
    tf32_products   whether a GPU may take float32 products in TF32
    chunk           rows at a time (None: what suits the device); memory is O(B * chunk)

    Without any candidate the result is -inf, and the gradient 0.
    """
    if chunk is None:
        chunk = max(512, CHUNK_ELEMENTS[query.device.type] // max(len(query), 1))
    with tf32(tf32_products):
        return _LogSumExp.apply(query, keys, bank, counts, temperature, chunk)


class _LogSumExp(torch.autograd.Function):
    """log_sum_exp in one pass over the candidates.

    The gradient of log Z_i is the softmax-weighted mean of the candidates, divided by T. The
    candidates need no gradient, so forward computes this mean in the same pass, as flash attention
    does with its values. Backward is one multiplication.
    """

    @staticmethod
    def forward(ctx, query, keys, bank, counts, temperature, chunk):
        with_mean = ctx.needs_input_grad[0]
        bounded = temperature >= LOWEST_TEMPERATURE and bank.dtype == query.dtype
        sums = _sums_below_a_bound if bounded and not on_host(counts) else _sums_below_a_maximum
        blocks = _blocks(keys, bank, counts, chunk)
        pivot, total, mean = sums(query, blocks, temperature, with_mean, bank.dtype)
        if with_mean:
            ctx.save_for_backward(
                mean.div_(total.clamp(min=torch.finfo(total.dtype).tiny)).div_(temperature)
            )
        return (pivot + total.log()).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (mean,) = ctx.saved_tensors
        return grad[:, None] * mean, None, None, None, None, None


def _sums_below_a_maximum(query, blocks, temperature, with_mean, bank_dtype):
    """The sums that log_sum_exp needs, with a running maximum of the logits as pivot.

    Returns pivot (B, 1), sum of exp(logit - pivot) (B, 1), and sum of exp(logit - pivot) *
    candidate (B, D), or zeros without with_mean.
    """
    products = bank_dtype if bank_dtype == torch.bfloat16 else query.dtype
    scaled = (query / temperature).to(products)
    largest = query.new_full((len(query), 1), -math.inf)
    total, mean = query.new_zeros(len(query), 1), torch.zeros_like(query)
    for features, multiplicity in blocks:
        features = features.to(products)
        logits = (scaled @ features.T).to(query.dtype)
        if multiplicity is not None:
            logits += multiplicity.to(query.dtype).log()
        new_largest = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        # before the first candidate the maximum is -inf, and -inf - (-inf) would be nan
        pivot = new_largest.masked_fill(new_largest == -math.inf, 0)
        exponentials = logits.sub_(pivot).exp_()
        scale = (largest - pivot).exp()
        total = total * scale + exponentials.sum(dim=1, keepdim=True)
        if with_mean:
            mean = mean.mul_(scale).add_(exponentials.to(products) @ features)
        largest = new_largest
    return largest, total, mean


def _sums_below_a_bound(query, blocks, temperature, with_mean, _):
    """The same for a GPU, with half as many passes over the logits of a block: all rows are unit
    vectors, so 1/T is a bound of all cosines over T. It is subtracted within the product, together
    with the addition of the logarithm of the counts.
    """
    bound = 1 / temperature
    total, mean = query.new_zeros(len(query), 1), torch.zeros_like(query)
    for features, multiplicity in blocks:
        features = features.to(query.dtype)
        if multiplicity is None:
            offset = query.new_full((len(features),), -bound)
        else:
            offset = multiplicity.to(query.dtype).log_().sub_(bound)
        exponentials = torch.addmm(offset, query, features.T, alpha=bound).exp_()
        total += exponentials.sum(dim=1, keepdim=True)
        if with_mean:
            # one product would have few output tiles and a long inner dimension, which leaves most
            # of a GPU idle
            splits = math.gcd(len(features), SPLITS)
            parts = exponentials.unflatten(1, (splits, -1)).transpose(0, 1)
            mean += torch.bmm(parts, features.unflatten(0, (splits, -1))).sum(dim=0)
    return bound, total, mean


def _blocks(keys: Tensor, bank: Tensor, counts: Tensor, chunk: int):
    """Candidates in blocks of c <= chunk rows: features (c, D) and counts (c,); None: each once."""
    for part in keys.split(chunk) if len(keys) else ():
        yield part, None
    if on_host(counts):  # on a CPU it pays to skip the rows that no image picked
        picked = counts.nonzero().squeeze(1)
        for rows in picked.split(chunk) if len(picked) else ():
            yield bank.index_select(0, rows), counts[rows]
    elif len(bank):
        yield from zip(bank.split(chunk), counts.split(chunk), strict=True)
