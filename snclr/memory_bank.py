"""The memory bank: the last M projections of the global batch, in the same order on every rank."""

import torch
from torch import Tensor, nn

from .running.devices import on_host
from .running.precision import full_precision, tf32, unit

# A search compares CHUNK rows of the bank at a time, with so many queries that their cosines take
# COSINES bytes.
COSINES = {"cpu": 2**23, "cuda": 2**26}
CHUNK = {"cpu": 2**14, "cuda": 2**17}
PRODUCTS = ("float32", "bfloat16", "tf32")
GROUP = 16  # columns that `largest` first reduces to their maximum


class MemoryBank(nn.Module):
    """First-in first-out bank of unit features, each with the data-set index of its image.

    features    (M, D) unit rows
    ids         (M,) data-set index of each row's image; -1 for a row that was never written
    pointer     () next row to write
    filled      () rows written so far, at most M
    features16  (M, D) with bfloat16 products: a copy in that format

    products: in what the large products are computed (running.devices.bank_products).

    All are buffers, and all except the copy are in the checkpoint. The caller enqueues the keys of
    all ranks, in rank order: so the bank is the same on every rank, and a run may resume with
    another number of ranks. No value moves to the host, so the host never waits for a GPU.
    """

    def __init__(self, size: int, dim: int, products: str = "float32"):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(
                "a memory bank needs at least one row and one dimension, "
                f"found size {size} and dim {dim}"
            )
        if products not in PRODUCTS:
            raise ValueError(f"products must be one of {PRODUCTS}, found {products!r}")
        self.tf32 = products == "tf32"
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer(
            "features16",
            self.features.bfloat16() if products == "bfloat16" else None,
            persistent=False,
        )
        self.register_load_state_dict_post_hook(MemoryBank._copy)

    def _copy(self, _) -> None:
        if self.features16 is not None:
            self.features16.copy_(self.features)

    @property
    def products(self) -> Tensor:
        """(M, D) the features in the format of the factors of large products."""
        return self.features if self.features16 is None else self.features16

    def __len__(self) -> int:
        """The number of rows M, written or not."""
        return len(self.features)

    def valid(self) -> Tensor:
        """(M,) bool: rows that hold a feature."""
        return torch.arange(len(self), device=self.filled.device) < self.filled

    @torch.no_grad()
    @full_precision
    def search(
        self, queries: Tensor, k: int, ids: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k rows of highest cosine to each query, best first.

        queries (B, D)  of any length
        ids (B,)        data-set indices of the queries' images: rows of the same image are ignored
        chunk           bank rows to compare at a time, which bounds the memory (None: CHUNK)

        Returns scores (B, k), cosines, and rows (B, k). If fewer than k rows are eligible, the rest
        has score -inf and row -1. Of bfloat16 or TF32 products, the best 2k rows are compared
        again in full precision. Raises ValueError if k exceeds the bank or the shapes do
        not fit.
        """
        size, dim = self.features.shape
        if queries.dim() != 2 or queries.shape[1] != dim:
            raise ValueError(
                f"queries must be (B, {dim}), as the bank's features, found {tuple(queries.shape)}"
            )
        if not 0 <= k <= size:
            raise ValueError(f"k must be between 0 and the bank's size {size}, found {k}")
        if ids is not None and ids.shape != queries.shape[:1]:
            raise ValueError(
                f"ids must be ({len(queries)},), one for each query, found {tuple(ids.shape)}"
            )
        if not k:
            no_scores = queries.new_zeros(len(queries), 0)
            return no_scores, no_scores.long()
        kind = queries.device.type
        chunk = min(size, chunk or CHUNK[kind])
        block = max(1, COSINES[kind] // (chunk * self.products.element_size()))
        parts = unit(queries).to(self.features.dtype).split(block)
        ids = [None] * len(parts) if ids is None else ids.split(block)
        results = [self._search(*pair, k, chunk) for pair in zip(parts, ids, strict=True)]
        return tuple(map(torch.cat, zip(*results, strict=True)))

    def _search(self, queries, ids, k, chunk):
        narrow, offset = queries.to(self.products.dtype), None
        is_rounded = self.tf32 or self.features16 is not None
        fetched = min(2 * k, len(self)) if is_rounded else k
        if self.features16 is not None:
            # bfloat16 is coarse near 1 and fine near 0: cosines that are all nearly 1 can only be
            # ordered after (about) the largest one is subtracted
            offset = -(narrow @ self.features16[::16].T).amax(dim=1, keepdim=True)
        written = int(self.filled) if on_host(self.filled) else len(self)
        scores = queries.new_full((len(queries), fetched), float("-inf"))
        rows = torch.full((len(queries), fetched), -1, dtype=torch.long, device=queries.device)
        for start in range(0, written, chunk):
            part = slice(start, min(start + chunk, written))
            features = self.products[part]
            added = offset
            if not on_host(self.filled):
                unwritten = torch.arange(start, part.stop, device=queries.device) >= self.filled
                added = narrow.new_zeros(1) if offset is None else offset
                added = added.masked_fill(unwritten, float("-inf"))  # (chunk,) or (B, chunk)
            with tf32(self.tf32):
                if added is None:
                    cosines = narrow @ features.T  # (B, chunk)
                else:
                    cosines = torch.addmm(added, narrow, features.T)
            if ids is not None:
                _mask_same(cosines, ids, self.ids[part])
            best, columns = largest(cosines, fetched)
            scores, order = torch.cat([scores, best.to(scores.dtype)], dim=1).topk(fetched)
            rows = torch.cat([rows, columns + start], dim=1).gather(1, order)
        if is_rounded:
            few = max(1, COSINES[queries.device.type] // (4 * fetched * self.features.shape[1]))
            parts = zip(queries.split(few), rows.clamp(min=0).split(few), strict=True)
            exact = [torch.einsum("bd,bkd->bk", q, gather(self.features, r)) for q, r in parts]
            exact = torch.cat(exact).masked_fill_(scores == float("-inf"), float("-inf"))
            scores, order = exact.topk(k)
            rows = rows.gather(1, order)
        return scores, rows.masked_fill_(scores == float("-inf"), -1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Write the keys (N, D) of all ranks, normalised, over the oldest rows.

        ids (N,): data-set indices of their images. If N exceeds M, only the last M keys are
        written, into the same rows as if the keys were written one by one.
        """
        size, dim = self.features.shape
        if keys.dim() != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(
                f"keys must be (N, {dim}) and ids (N,), "
                f"found {tuple(keys.shape)} and {tuple(ids.shape)}"
            )
        count = len(keys)
        kept = min(count, size)
        first = self.pointer + (count - kept)
        rows = (first + torch.arange(kept, device=self.features.device)) % size
        written = unit(keys[count - kept :]).to(self.features.dtype)
        # a key that is not finite does not replace its row: all later searches would find it
        sound = written.isfinite().all(dim=1)
        written = torch.where(sound[:, None], written, self.features[rows])
        self.features.index_copy_(0, rows, written)
        if self.features16 is not None:
            self.features16.index_copy_(0, rows, written.to(self.features16.dtype))
        self.ids.index_copy_(
            0, rows, torch.where(sound, ids[count - kept :].to(self.ids), self.ids[rows])
        )
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.add_(count).clamp_(max=size)


def gather(features: Tensor, rows: Tensor) -> Tensor:
    """features (M, D) at rows (B, K), none of them -1: (B, K, D). Faster than indexing on a CPU."""
    return features.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _mask_same(cosines: Tensor, ids: Tensor, bank_ids: Tensor) -> None:
    """Set cosines (B, M) to -inf where ids (B,) of the queries and bank_ids (M,) are the same."""
    if not on_host(ids):
        cosines.masked_fill_(ids[:, None] == bank_ids, float("-inf"))
    elif len(ids):  # few columns have a common id: finding them is faster than masking all
        ordered = ids.sort().values
        nearest = ordered[torch.searchsorted(ordered, bank_ids).clamp_(max=len(ids) - 1)]
        columns = (nearest == bank_ids).nonzero()[:, 0]
        same = ids[:, None] == bank_ids[columns]
        cosines[:, columns] = cosines[:, columns].masked_fill(same, float("-inf"))


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as scores.topk(min(k, n)) for scores (B, n), but many times faster for large n.

    The k largest lie in the k groups of columns with the largest maxima. A group is every
    (n / GROUP)-th column, so that the maxima are elementwise ones of contiguous slices.
    """
    width = scores.shape[1]
    groups = width // GROUP
    if groups < 4 * k:
        return scores.topk(min(k, width))
    whole = groups * GROUP
    maxima = scores[:, :whole].unflatten(1, (GROUP, groups)).amax(dim=1)
    columns = maxima.topk(k, sorted=False).indices[:, :, None] + torch.arange(
        0, whole, groups, device=scores.device
    )
    rest = torch.arange(whole, width, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns.flatten(1), rest], dim=1)
    best, order = scores.gather(1, columns).topk(k)
    return best, columns.gather(1, order)
