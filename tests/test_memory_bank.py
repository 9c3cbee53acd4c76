import oracles
import pytest
import torch
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from snclr import memory_bank, objectives, streamed
from snclr.memory_bank import MemoryBank, largest
from snclr.running.devices import bank_products
from snclr.running.precision import tf32, unit


def filled_bank(size=40, dim=6, rows=40, seed=0, images=15):
    """A float64 bank in which every image has several old copies."""
    torch.manual_seed(seed)
    bank = MemoryBank(size, dim).double()
    for start in range(0, rows, 8):
        count = min(8, rows - start)
        bank.enqueue(
            torch.randn(count, dim, dtype=torch.float64), torch.randint(0, images, (count,))
        )
    return bank


@pytest.mark.parametrize(
    "batches", [[3, 3, 3, 3], [10], [25], [7, 23, 1], [10, 10, 10], [4, 40, 4], [1] * 23]
)
def test_the_bank_holds_the_last_rows_in_order_for_any_batch_and_bank_size(batches):
    bank, written = MemoryBank(10, 3), []
    for batch in batches:
        keys = torch.randn(batch, 3)
        ids = torch.arange(len(written), len(written) + batch)
        bank.enqueue(keys, ids)
        written += list(normalize(keys, dim=1))
    ring = [None] * 10
    for number, key in enumerate(written):
        ring[number % 10] = (number, key)
    assert bank.pointer == len(written) % 10 and bank.filled == min(10, len(written))
    for row, entry in enumerate(ring):
        assert bank.ids[row] == (-1 if entry is None else entry[0])
        torch.testing.assert_close(
            bank.features[row], torch.zeros(3) if entry is None else entry[1]
        )


@pytest.mark.parametrize("rows", [0, 1, 13, 40, 61])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 40, 8192])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("on_host", [True, False])  # False: what a GPU does
def test_search_equals_the_exhaustive_one(rows, exclude, chunk, k, on_host, monkeypatch):
    monkeypatch.setattr(memory_bank, "on_host", lambda _: on_host)
    bank = filled_bank(rows=rows)
    queries, ids = torch.randn(9, 6, dtype=torch.float64), torch.arange(9)
    scores, actual = bank.search(queries, k, ids if exclude else None, chunk=chunk)
    expected = oracles.neighbours(
        queries, bank.features, bank.ids, int(bank.filled), k, ids if exclude else None
    )
    assert torch.equal(actual, expected)
    valid = actual >= 0
    assert torch.equal(scores == float("-inf"), ~valid)
    cosines = normalize(queries, dim=1) @ bank.features.T
    torch.testing.assert_close(scores[valid], cosines.gather(1, actual.clamp(min=0))[valid])


def test_an_old_copy_of_the_query_is_its_own_neighbour_only_without_exclusion():
    bank = filled_bank()
    queries, ids = bank.features[:8].clone(), bank.ids[:8].clone()
    _, rows = bank.search(queries, 1)
    assert torch.equal(rows[:, 0], torch.arange(8))
    _, rows = bank.search(queries, 20, ids)
    assert (bank.ids[rows] != ids[:, None])[rows >= 0].all()
    bank.ids.fill_(3)  # only copies
    _, rows = bank.search(queries, 2, torch.full((8,), 3))
    assert (rows == -1).all()


def test_an_unwritten_row_is_never_found_even_by_its_zero_cosine():
    bank = MemoryBank(10, 2)
    bank.enqueue(torch.tensor([[-1.0, 0.0]]), torch.tensor([4]))
    scores, rows = bank.search(torch.tensor([[1.0, 0.0]]), 2)
    assert rows.tolist() == [[0, -1]] and scores[0, 0] == -1


def test_the_bank_travels_in_the_state_dict():
    bank, other = filled_bank(), MemoryBank(40, 6).double()
    assert set(bank.state_dict()) == {"features", "ids", "pointer", "filled"}
    other.load_state_dict(bank.state_dict())
    keys, ids = torch.randn(11, 6, dtype=torch.float64), torch.arange(11)
    for each in (bank, other):
        each.enqueue(keys, ids)
    assert all(
        torch.equal(a, b)
        for a, b in zip(bank.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("width", [1, 5, 31, 32, 640, 641, 5000])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_the_largest_of_wide_rows_are_found_through_their_groups(width, k):
    scores = torch.randn(7, width)
    scores[3, 2:] = float("-inf")
    best, columns = largest(scores, k)
    expected = scores.topk(min(k, width))
    assert torch.equal(best, expected.values)
    seen = best > float("-inf")
    assert torch.equal(columns[seen], expected.indices[seen])


def crowded(generator, count, centres, cosine=0.95):
    """Unit rows in clusters: two of a cluster have about this cosine."""
    members = centres[torch.randint(len(centres), (count,), generator=generator)]
    noise = normalize(torch.randn(count, centres.shape[1], generator=generator), dim=1)
    return normalize(members + (1 / cosine - 1) ** 0.5 * noise, dim=1)


@pytest.mark.parametrize("clusters", [None, 8])
def test_bfloat16_products_find_the_true_neighbours_even_where_features_crowd(clusters):
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(clusters or 4000, 64, generator=generator), dim=1)
    keys, queries = crowded(generator, 4000, centres), crowded(generator, 40, centres)
    narrow, exact = MemoryBank(4000, 64, products="bfloat16"), MemoryBank(4000, 64)
    for bank in (narrow, exact):
        bank.enqueue(keys, torch.arange(4000))
    (scores, rows), (true_scores, true_rows) = (
        bank.search(queries, 30) for bank in (narrow, exact)
    )
    recall = (
        sum(len({*a} & {*b}) for a, b in zip(rows.tolist(), true_rows.tolist(), strict=True))
        / rows.numel()
    )
    assert recall > 0.99
    torch.testing.assert_close(scores, true_scores, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        scores, (queries @ keys.T).gather(1, rows)
    )  # of the rows found, in full precision


def test_a_gpus_search_finds_the_true_neighbours_where_features_crowd(monkeypatch):
    monkeypatch.setattr(memory_bank, "on_host", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(8, 64, generator=generator), dim=1)
    keys, queries = crowded(generator, 4000, centres), crowded(generator, 40, centres)
    bank = MemoryBank(4000, 64, bank_products("bf16", torch.device("cuda")))
    bank.enqueue(keys, torch.arange(4000))
    _, rows = bank.search(queries, 30)
    true_rows = (queries.double() @ keys.double().T).topk(30).indices
    found = torch.stack([torch.isin(*pair) for pair in zip(rows, true_rows, strict=True)])
    assert found.double().mean() >= 0.999


def test_in_what_the_large_products_are_computed():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [bank_products(amp, gpu) for amp in ("off", "bf16", "fp16")] == [
        "float32",
        "tf32",
        "tf32",
    ]
    assert [bank_products(amp, cpu) for amp in ("off", "bf16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("products, expected", [("float32", False), ("tf32", True)])
def test_only_the_large_products_are_in_tf32(products, expected, monkeypatch):
    """And the search compares its best rows again in float32."""
    seen = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = function.__name__
            if name in ("matmul", "__matmul__", "addmm", "bmm", "einsum"):
                seen.append((name, torch.backends.cuda.matmul.allow_tf32))
            return function(*args, **(kwargs or {}))

    for module in (memory_bank, streamed):
        monkeypatch.setattr(module, "on_host", lambda _: False)
    bank = MemoryBank(40, 6, products)
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, 6, generator=generator) for n in (40, 5))
    bank.enqueue(keys, torch.arange(40))
    with Products():
        scores, rows = bank.search(queries, 3)
        weights = objectives.positiveness(queries, bank.features, rows)
        query = queries.clone().requires_grad_()
        objectives.snclr_loss(
            query, queries, bank.products, rows, weights, temperature=0.2, tf32=bank.tf32
        ).backward()
    assert {tf32 for name, tf32 in seen if name in ("addmm", "bmm")} == {expected}
    assert {tf32 for name, tf32 in seen if name == "einsum"} == {False}
    assert sum(name == "einsum" for name, _ in seen) == 2 + expected
    assert not torch.backends.cuda.matmul.allow_tf32
    true_scores, true_rows = (unit(queries) @ unit(keys).T).topk(3)
    assert torch.equal(rows, true_rows)
    torch.testing.assert_close(scores, true_scores)


def test_tf32_is_as_before_after_an_error():
    for before in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = before
        try:
            with pytest.raises(ValueError), tf32(True):
                assert torch.backends.cuda.matmul.allow_tf32
                raise ValueError
            with tf32(False):
                assert torch.backends.cuda.matmul.allow_tf32 == before
            assert torch.backends.cuda.matmul.allow_tf32 == before
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


def test_the_bfloat16_copy_follows_the_bank_and_is_no_part_of_a_checkpoint():
    torch.manual_seed(0)
    bank, other = MemoryBank(10, 3, products="bfloat16"), MemoryBank(10, 3, products="bfloat16")
    assert set(bank.state_dict()) == {"features", "ids", "pointer", "filled"}
    for count in (4, 9):
        bank.enqueue(torch.randn(count, 3), torch.arange(count))
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        assert each.products.dtype == torch.bfloat16 and torch.equal(
            each.products, bank.features.bfloat16()
        )


def test_search_under_autocast_is_not_taken_in_16_bits():
    bank = filled_bank().float()
    queries = torch.randn(9, 6)
    exact = bank.search(queries, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(bank.search(queries, 5), exact, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda bank: bank.search(torch.randn(2, 6), 41),
            "k must be between 0 and the bank's size 40, found 41",
        ),
        (lambda bank: bank.search(torch.randn(2, 5), 1), r"queries must be \(B, 6\)"),
        (lambda bank: bank.search(torch.randn(2, 6), 1, torch.arange(3)), r"ids must be \(2,\)"),
        (lambda bank: bank.enqueue(torch.randn(2, 5), torch.arange(2)), r"keys must be \(N, 6\)"),
        (lambda bank: bank.enqueue(torch.randn(2, 6), torch.arange(3)), r"keys must be \(N, 6\)"),
        (lambda bank: MemoryBank(0, 6), "at least one row"),
        (lambda bank: MemoryBank(8, 6, True), "products must be one of"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(filled_bank())
