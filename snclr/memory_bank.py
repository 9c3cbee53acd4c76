"""The memory bank: the last M projections of the whole global batch, in the same order on every rank."""

import torch
from torch import Tensor, nn

from .precision import full_precision, unit


class MemoryBank(nn.Module):
    """First-in first-out bank of unit features, each with the data-set index of its image.

    features (M, D) unit rows; ids (M,) data-set index, -1 where nothing was written; pointer () next row to write;
    filled () rows written so far, at most M. All are buffers, so the bank travels in the checkpoint.
    The caller enqueues the keys of ALL ranks in rank order: then the bank is identical everywhere, and a run may resume
    on another number of ranks. Nothing here moves a value to the host, so a GPU never waits.
    """

    features: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a memory bank needs at least one row and one dimension, found size {size} and dim {dim}")
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        """Rows the bank can hold (M), written or not."""
        return len(self.features)

    def valid(self) -> Tensor:
        """(M,) bool: rows that hold a feature."""
        return torch.arange(len(self), device=self.filled.device) < self.filled

    @torch.no_grad()
    @full_precision
    def search(self, queries: Tensor, k: int, ids: Tensor | None = None, chunk: int = 8192) -> tuple[Tensor, Tensor]:
        """The k rows of highest cosine to each query, best first.

        queries (B, D), of any length; ids (B,) data-set indices of the queries' images: a row of the same image is left
        out (None: nothing is). Returns scores (B, k) cosines and rows (B, k); where fewer than k rows are eligible the
        rest has score -inf and row -1. Streams over the bank, so memory is O(B * (chunk + k)).
        Raises ValueError where k exceeds the bank or the shapes do not fit.
        """
        size, dim = self.features.shape
        if queries.dim() != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries must be (B, {dim}) as the bank's features are, found {tuple(queries.shape)}")
        if not 0 <= k <= size:
            raise ValueError(f"k must be between 0 and the bank's size {size}, found {k}")
        if ids is not None and ids.shape != queries.shape[:1]:
            raise ValueError(f"ids must be ({len(queries)},), one a query, found {tuple(ids.shape)}")
        queries = unit(queries).to(self.features.dtype)
        scores = queries.new_full((len(queries), k), float("-inf"))
        rows = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
        for start in range(0, size if k else 0, chunk):
            stop = min(start + chunk, size)
            cosines = queries @ self.features[start:stop].T  # (B, chunk)
            cosines.masked_fill_(torch.arange(start, stop, device=queries.device) >= self.filled, float("-inf"))
            if ids is not None:
                cosines.masked_fill_(ids[:, None] == self.ids[start:stop], float("-inf"))
            best, where = cosines.topk(min(k, stop - start))
            scores, order = torch.cat([scores, best], dim=1).topk(k)
            rows = torch.cat([rows, where + start], dim=1).gather(1, order)
        return scores, rows.masked_fill_(scores == float("-inf"), -1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Write keys (N, D) of all ranks, normalised, with their data-set indices ids (N,) over the oldest rows.

        Any N: of a batch larger than the bank only the last M keys stay, where they would have ended up one by one.
        """
        size, dim = self.features.shape
        if keys.dim() != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(f"keys must be (N, {dim}) and ids (N,), found {tuple(keys.shape)} and {tuple(ids.shape)}")
        count = len(keys)
        kept = min(count, size)
        first = self.pointer + (count - kept)
        rows = (first + torch.arange(kept, device=self.features.device)) % size
        features = unit(keys[count - kept :]).to(self.features.dtype)
        sound = features.isfinite().all(dim=1)  # another key leaves its row as it was: every later search would find it
        self.features.index_copy_(0, rows, torch.where(sound[:, None], features, self.features[rows]))
        self.ids.index_copy_(0, rows, torch.where(sound, ids[count - kept :].to(self.ids), self.ids[rows]))
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.add_(count).clamp_(max=size)
