"""Slow and obvious twins of the objectives and the bank, written from the equations: loops and
dense matrices, float64.

They see the whole global batch at once (the joined batches of all ranks) and know nothing of counts
or chunks.
"""

import torch
from torch.nn.functional import normalize


def neighbours(queries, features, ids, filled, k, own_ids=None):
    """rows (B, k): for each query the k written rows of highest cosine that are not of its own
    image; -1 for none.
    """
    rows = torch.full((len(queries), k), -1)
    for i, query in enumerate(normalize(queries.double(), dim=1)):
        ranked = []
        for m in range(filled):
            if own_ids is None or ids[m] != own_ids[i]:
                ranked.append((float(query @ features[m].double()), m))
        ranked.sort(key=lambda pair: -pair[0])
        for k_, (_, m) in enumerate(ranked[:k]):
            rows[i, k_] = m
    return rows


def positiveness(online, bank, rows, temperature=1.0, threshold=False, projections=None):
    """w_ik = exp(f1 y_i . f2 C[rows_ik] / temperature) / sum over the valid k; with threshold, 0
    unless above 1/(valid).
    """
    online = normalize(online, dim=1)
    if projections is not None:
        online = torch.stack([projections[0] @ y for y in online])
        bank = torch.stack([projections[1] @ c for c in bank])
    weights = []
    for i in range(len(rows)):
        valid = [k for k in range(rows.shape[1]) if rows[i, k] >= 0]
        scores = {k: torch.exp(online[i] @ bank[rows[i, k]] / temperature) for k in valid}
        line = []
        for k in range(rows.shape[1]):
            weight = scores[k] / sum(scores.values()) if k in valid else online.new_zeros(())
            if threshold and k in valid and not weight > 1 / len(valid):
                weight = weight * 0
            line.append(weight)
        weights.append(torch.stack(line) if line else online.new_zeros(0))
    return torch.stack(weights)


def mixed(neighbours, key, shares):
    """Positives (N, K, D): the neighbour (N, K, D) times its share (N, K), plus the rest of the
    key (N, D), on the unit sphere.
    """
    key, lines = normalize(key, dim=1), []
    for i in range(len(key)):
        line = [s * v + (1 - s) * key[i] for s, v in zip(shares[i], neighbours[i], strict=True)]
        lines.append(torch.stack([vector / vector.norm() for vector in line]))
    return torch.stack(lines)


def snclr(
    query,
    key,
    bank,
    rows,
    weights,
    temperature,
    form="sum_of_logs",
    candidates="all",
    positives=None,
    normalise=False,
):
    """Per-image losses (N,) of a whole global batch, without the mean: every candidate of every
    sample written out. positives (N, K, D): in the place of the neighbours, if given.
    """
    query, key = normalize(query, dim=1), normalize(key, dim=1)
    picked = [row for line in rows.tolist() for row in line if row >= 0]  # a multiset
    picked = {"all": picked, "unique": sorted(set(picked)), "keys": []}[candidates]
    candidates = torch.stack([*key, *(bank[row] for row in picked)])
    losses = []
    for i in range(len(query)):
        logits = candidates @ query[i] / temperature
        denominator = torch.exp(logits).sum()
        own = [(1.0, key[i])]
        own += [
            (weights[i, k], bank[row] if positives is None else positives[i, k])
            for k, row in enumerate(rows[i].tolist())
            if row >= 0
        ]
        if normalise:
            own = [(w / sum(w for w, _ in own), vector) for w, vector in own]
        probabilities = [
            (w, torch.exp(query[i] @ vector / temperature) / denominator) for w, vector in own
        ]
        if form == "sum_of_logs":
            losses.append(sum(-w * torch.log(p) for w, p in probabilities))
        else:
            losses.append(-torch.log(sum(w * p for w, p in probabilities)))
    return 2 * temperature * torch.stack(losses)


def pairs(num_views):
    """Every view is a query against each of the two global views (0 and 1) but itself: list of
    (query, key view).
    """
    matches = []
    for key in range(2):
        for query in range(num_views):
            if query != key:
                matches.append((query, key))
    return matches


def weak_step(y, z, key, bank, rows, temperature, *, mass, weights, attention, shares, **loss):
    """Loss of a step with one key (N, D), the target of all views: twice the mean over the views.

    weights: 'key', or any other for those by the projection; shares (N, K) or None; attention,
    loss: further arguments of positiveness and of snclr.
    """
    positives = None if shares is None else mixed(bank[rows.clamp(min=0)], key, shares)
    losses = []
    for q in range(len(z)):
        w = mass * positiveness(key if weights == "key" else y[q], bank, rows, **attention)
        losses.append(snclr(z[q], key, bank, rows, w, temperature, positives=positives, **loss))
    return 2 * torch.stack(losses).mean()


def same_label_negatives(ids, labels, rows, neighbour_ids, candidates):
    """Of all pairs of an image and a negative whose labels are known, the share of equal labels.

    rows, neighbour_ids (N, K): bank rows and their images, -1 for none. The candidates 'all',
    'unique', 'keys' as above. An image's negatives are neither its key nor one of its own rows.
    """
    picked = [
        (int(row), int(image))
        for line in zip(rows, neighbour_ids, strict=True)
        for row, image in zip(*line, strict=True)
        if row >= 0
    ]
    picked = {"all": picked, "unique": sorted(set(picked)), "keys": []}[candidates]
    pairs = []
    for i, image in enumerate(ids.tolist()):
        others = [other for n, other in enumerate(ids.tolist()) if n != i]
        others += [other for row, other in picked if row not in rows[i].tolist()]
        pairs += [(int(labels[image]), int(labels[other])) for other in others]
    pairs = [pair for pair in pairs if min(pair) >= 0]
    return sum(a == b for a, b in pairs) / len(pairs)


def snclr_step(y, z, keys, bank, rows, temperature):
    """Loss of a step: twice the mean over the pairs; y, z one (N, D) for each view, keys and rows
    for each global one.
    """
    losses = [
        snclr(z[q], keys[k], bank, rows[k], positiveness(y[q], bank, rows[k]), temperature).mean()
        for q, k in pairs(len(z))
    ]
    return 2 * torch.stack(losses).mean()


def mocov3_step(z, keys, temperature):
    """As above, without neighbours."""
    nothing = torch.empty(len(keys[0]), 0)
    return snclr_step(z, z, keys, keys[0][:0], [nothing.long(), nothing.long()], temperature)


def mocov3_one(query, key, temperature):
    """One direction, without neighbours."""
    nothing = torch.empty(len(key), 0)
    return snclr(query, key, key[:0], nothing.long(), nothing, temperature).mean()


def nnclr_step(z, nearest, temperature):
    """Mean over the pairs; nearest: of each global view, its neighbours (N, D) in the bank."""
    losses = [nnclr(nearest[k], z[q], temperature).mean() for q, k in pairs(len(z))]
    return torch.stack(losses).mean()


def nnclr(neighbour, prediction, temperature):
    """Per-image losses (N,): cross-entropy of each neighbour over all predictions of the global
    batch.
    """
    neighbour, prediction = normalize(neighbour, dim=1), normalize(prediction, dim=1)
    return torch.stack(
        [
            -torch.log(
                torch.exp(n @ prediction[i] / temperature)
                / torch.exp(prediction @ n / temperature).sum()
            )
            for i, n in enumerate(neighbour)
        ]
    )


def mocov2(query, key, bank, filled, temperature):
    """Per-image losses (N,): the own key against the written rows of the bank."""
    query, key = normalize(query, dim=1), normalize(key, dim=1)
    losses = []
    for i in range(len(query)):
        own = torch.exp(query[i] @ key[i] / temperature)
        others = sum(
            (torch.exp(query[i] @ bank[m] / temperature) for m in range(filled)), torch.zeros(())
        )
        losses.append(-torch.log(own / (own + others)))
    return torch.stack(losses)
