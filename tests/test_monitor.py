import json
import math
import time
from argparse import Namespace

import oracles
import pytest
import torch
from torch.nn.functional import normalize

from snclr.objectives import (
    CANDIDATES,
    FORMS,
    Candidates,
    count_picks,
    gather_candidates,
    gather_neighbours,
    loss_at_chance,
    mix_with_keys,
    mocov2_loss,
    mocov3_loss,
    nnclr_loss,
    positiveness,
    restrict,
    snclr_loss,
)
from snclr.running import log as run_log
from snclr.running.metrics import StepView, Waits, step_metrics
from snclr.running.settings import save_settings
from snclr.running.summary import describe, final_lines

SNCLR = dict(method="snclr", form="sum_of_logs", temperature=0.2)
NEIGHBOUR_METRICS = {
    "neighbour_similarity",
    "positiveness_entropy",
    "distinct_rows",
    "largest_count",
    "neighbour_purity",
    "weighted_purity",
}


def shown(batch=6, k=4, dim=16, images=40, bank_size=20, seed=0):
    """A step in which some neighbours are missing: image 0 has none, image 1 a single one."""
    generator = torch.Generator().manual_seed(seed)
    neighbour_ids = torch.randint(0, images, (batch, k), generator=generator)
    neighbour_ids[0], neighbour_ids[1, 1:], neighbour_ids[2, -1] = -1, -1, -1
    valid = neighbour_ids >= 0
    scores = torch.rand(batch, k, generator=generator).masked_fill(~valid, -math.inf)
    weights = torch.softmax(scores, dim=1).nan_to_num(0)
    counts = torch.zeros(bank_size, dtype=torch.int32)
    counts[3], counts[7], counts[19] = 5, 1, int(valid.sum()) - 6
    num_candidates = torch.tensor(batch + int(valid.sum()))
    projection = torch.randn(batch, dim, generator=generator)
    return StepView(
        projection, scores, neighbour_ids, weights, counts, num_candidates, torch.tensor(0.5)
    )


def without_neighbours(projection, num_candidates=8):
    nothing = torch.zeros(len(projection), 0)
    rows = nothing.long()
    return StepView(
        projection,
        nothing,
        rows,
        nothing,
        torch.zeros(0, dtype=torch.long),
        torch.tensor(num_candidates),
        None,
    )


def metrics_by_loops(view, ids, labels):
    """similarity, entropy, purity from one neighbour after the other."""
    similarities, entropies, same = [], [], []
    for i, line in enumerate(view.neighbour_ids.tolist()):
        valid = [k for k, neighbour in enumerate(line) if neighbour >= 0]
        total = sum(view.weights[i, k].item() for k in valid)
        for k in valid:
            similarities.append(view.scores[i, k].item())
            if labels[line[k]] >= 0 and labels[ids[i]] >= 0:
                same.append(labels[line[k]].item() == labels[ids[i]].item())
        if len(valid) > 1:
            shares = [view.weights[i, k].item() / total for k in valid]
            entropies.append(-sum(s * math.log(s) for s in shares if s > 0) / math.log(len(valid)))
    return [sum(values) / len(values) for values in (similarities, entropies, same)]


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch, k", [(6, 4), (8, 2), (4, 7)])
def test_neighbour_metrics_equal_the_loops(batch, k, seed, unlabelled):
    view = shown(batch, k, seed=seed)
    ids, labels = torch.arange(batch) + 5, torch.arange(40) % 3 - int(unlabelled)
    metrics = step_metrics(torch.tensor(2.0), view, ids, labels, **SNCLR)
    similarity, entropy, purity = metrics_by_loops(view, ids, labels)
    assert metrics["neighbour_similarity"] == pytest.approx(similarity, rel=1e-6)
    assert metrics["positiveness_entropy"] == pytest.approx(entropy, rel=1e-6)
    assert metrics["neighbour_purity"] == pytest.approx(purity, rel=1e-12)
    assert metrics["distinct_rows"] == sum(count > 0 for count in view.counts.tolist())
    assert metrics["largest_count"] == max(view.counts.tolist())
    assert metrics["bank_fill"] == 0.5
    assert json.loads(json.dumps(metrics)) == metrics  # plain numbers, ready for a line of JSON


@pytest.mark.parametrize("k", [2, 3, 30])
def test_entropy_is_one_for_uniform_weights_and_zero_for_a_single_positive(k):
    view = shown(k=k)
    view = view._replace(
        neighbour_ids=torch.zeros(6, k, dtype=torch.long), scores=torch.zeros(6, k)
    )
    for weights, expected in ((torch.full((6, k), 1 / k), 1), (torch.eye(k)[0].expand(6, k), 0)):
        metrics = step_metrics(
            torch.tensor(2.0), view._replace(weights=weights), torch.arange(6), None, **SNCLR
        )
        assert metrics["positiveness_entropy"] == pytest.approx(expected, abs=1e-6)


def test_entropy_is_of_the_shares_that_a_threshold_leaves():
    view = shown(k=4)._replace(
        neighbour_ids=torch.zeros(6, 4, dtype=torch.long), scores=torch.zeros(6, 4)
    )
    left = view._replace(weights=torch.tensor([0.3, 0.3, 0, 0]).expand(6, 4))
    metrics = step_metrics(torch.tensor(2.0), left, torch.arange(6), None, **SNCLR)
    assert metrics["positiveness_entropy"] == pytest.approx(0.5, abs=1e-6)


def test_entropy_is_undefined_if_no_image_has_two_neighbours():
    view = shown(k=1)
    metrics = step_metrics(torch.tensor(2.0), view, torch.arange(6), None, **SNCLR)
    assert metrics["positiveness_entropy"] is None
    assert metrics["neighbour_similarity"] == pytest.approx(
        view.scores[view.neighbour_ids >= 0].mean().item()
    )


def test_purity_needs_labels_and_nothing_else_does():
    view, ids = shown(), torch.arange(6)
    unlabelled = step_metrics(torch.tensor(2.0), view, ids, None, **SNCLR)
    labelled = step_metrics(
        torch.tensor(2.0), view, ids, torch.zeros(40, dtype=torch.long), **SNCLR
    )
    assert labelled.pop("neighbour_purity") == labelled.pop("weighted_purity") == 1
    assert labelled == unlabelled


@pytest.mark.parametrize("kind", CANDIDATES)
@pytest.mark.parametrize("unlabelled", [False, True])
def test_weighted_purity_and_same_label_negatives_equal_the_loops(kind, unlabelled):
    generator = torch.Generator().manual_seed(0)
    ids, images_of_rows = torch.arange(8) + 5, torch.randint(40, (12,), generator=generator)
    rows = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in ids])
    rows[0], rows[1, 2:] = -1, -1
    view = shown(8, 4)
    view = view._replace(
        rows=rows,
        neighbour_ids=torch.where(rows >= 0, images_of_rows[rows], -1),
        counts=count_picks(rows, 12),
        weights=torch.rand(8, 4, generator=generator) * (rows >= 0),
    )
    candidates = restrict(Candidates(torch.zeros(8, 2), view.counts), kind)
    view = view._replace(row_candidates=candidates.counts)
    labels = torch.arange(40) % 3 - int(unlabelled)
    metrics = step_metrics(torch.tensor(2.0), view, ids, labels, **SNCLR)
    expected = oracles.same_label_negatives(ids, labels, rows, view.neighbour_ids, kind)
    assert metrics["same_label_negatives"] == pytest.approx(expected, rel=1e-12)
    same = total = 0
    for i, line in enumerate(view.neighbour_ids.tolist()):
        for k, image in enumerate(line):
            if image >= 0 and labels[image] >= 0 and labels[ids[i]] >= 0:
                total += view.weights[i, k].double()
                same += view.weights[i, k].double() * (labels[image] == labels[ids[i]])
    assert metrics["weighted_purity"] == pytest.approx(float(same / total), rel=1e-12)


def test_same_label_negatives_of_a_batch_without_a_bank():
    none = torch.zeros(0, dtype=torch.long)
    view = without_neighbours(torch.randn(4, 8))
    view = view._replace(rows=none.expand(4, 0), row_candidates=none)
    labels = torch.tensor([0, 0, 0, 1])
    metrics = step_metrics(torch.tensor(2.0), view, torch.arange(4), labels, **SNCLR)
    assert metrics["same_label_negatives"] == 6 / 12
    assert "weighted_purity" not in metrics


def test_missing_neighbour_is_not_taken_for_the_last_image():
    labels = torch.zeros(40, dtype=torch.long)
    labels[-1] = 1
    view = shown()._replace(neighbour_ids=torch.tensor([[3, -1, -1, -1]]).repeat(6, 1))
    ids = torch.full((6,), 39)
    assert step_metrics(torch.tensor(2.0), view, ids, labels, **SNCLR)["neighbour_purity"] == 0


@pytest.mark.parametrize("k", [0, 3])
def test_step_without_any_neighbour_has_no_neighbour_metrics(k):
    view = without_neighbours(torch.randn(6, 16))
    if k:
        view = view._replace(
            neighbour_ids=torch.full((6, k), -1),
            scores=torch.full((6, k), -math.inf),
            weights=torch.zeros(6, k),
            counts=torch.zeros(20, dtype=torch.int32),
        )
    metrics = step_metrics(torch.tensor(2.0), view, torch.arange(6), torch.arange(40), **SNCLR)
    assert not (NEIGHBOUR_METRICS | {"bank_fill"}) & set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dim", [64, 256])
def test_feature_std_is_one_for_random_directions_of_any_length(dim):
    projection = (
        torch.randn(2000, dim, generator=torch.Generator().manual_seed(0))
        * torch.rand(2000, 1)
        * 10
    )
    metrics = step_metrics(
        torch.tensor(2.0), without_neighbours(projection), torch.arange(2000), None, **SNCLR
    )
    assert metrics["feature_std"] == pytest.approx(1, abs=0.01)


def test_feature_std_is_zero_at_collapse():
    projection = torch.randn(1, 64) * torch.rand(500, 1)  # one direction, many lengths
    metrics = step_metrics(
        torch.tensor(2.0), without_neighbours(projection), torch.arange(500), None, **SNCLR
    )
    assert metrics["feature_std"] == pytest.approx(0, abs=1e-5)


def test_feature_std_equals_the_loop():
    view = shown()
    unit = normalize(view.projection.double(), dim=1)
    expected = sum(unit[:, d].std(unbiased=False).item() for d in range(16)) / 16 * math.sqrt(16)
    metrics = step_metrics(torch.tensor(2.0), view, torch.arange(6), None, **SNCLR)
    assert metrics["feature_std"] == pytest.approx(expected, rel=1e-6)


# -- the loss at chance ----------------------------------------------------------------------------


def same_cosines(cosine, batch=5, k=3, bank_size=12, dim=16):
    """Queries whose cosine with every key and every bank row is the same."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.eye(dim, dtype=torch.float64)[0]
    others = normalize(
        torch.randn(batch + bank_size, dim - 1, generator=generator, dtype=torch.float64), dim=1
    )
    around = torch.cat(
        [torch.full_like(others[:, :1], cosine), others * math.sqrt(1 - cosine**2)], dim=1
    )
    keys, bank = around.split([batch, bank_size])
    rows = torch.randint(0, bank_size, (batch, k), generator=generator)
    rows[0], rows[1, 1:] = -1, -1
    return axis.expand(batch, dim), keys, bank, rows


@pytest.mark.parametrize("cosine", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["attention", "uniform", "thresholded"])
def test_loss_at_chance_is_snclrs_loss_where_all_candidates_look_the_same(kind, form, cosine):
    query, keys, bank, rows = same_cosines(cosine)
    online = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = positiveness(online, bank, rows, threshold=kind == "thresholded")
    if kind == "uniform":
        weights = (rows >= 0).double() / (rows >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    if form == "log_of_sum":  # the mean of ln W is not the ln of the mean: all images alike
        rows, weights = rows[2:3].repeat(5, 1), weights[2:3].repeat(5, 1)
    loss = 2 * snclr_loss(
        query, keys, bank, rows, weights, temperature=0.3, form=form
    )  # both directions
    num_candidates = 5 + int((rows >= 0).sum())
    chance = loss_at_chance("snclr", form, 0.3, num_candidates, 1 + weights.sum().item() / 5)
    assert loss.item() == pytest.approx(chance, rel=1e-10)
    view = without_neighbours(online, num_candidates)
    view = view._replace(
        scores=torch.zeros(5, 3), neighbour_ids=rows, weights=weights, counts=torch.ones(12)
    )
    metrics = step_metrics(
        loss, view, torch.arange(5), None, method="snclr", form=form, temperature=0.3
    )
    assert metrics["loss_ratio"] == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("kind", CANDIDATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalised", [False, True])
def test_the_ratio_to_chance_holds_for_all_candidates_and_mixed_or_normalised_positives(
    form, kind, normalised
):
    query, keys, bank, rows = same_cosines(0.0)
    rows, weights = rows[2:3].repeat(5, 1), torch.tensor([[0.5, 0.2, 0.1]]).double().repeat(5, 1)
    candidates = restrict(gather_candidates(keys, rows, len(bank)), kind)
    mixed = mix_with_keys(
        gather_neighbours(bank, rows), keys, torch.rand(5, 3)
    )  # cosines of 0, too
    loss = 2 * snclr_loss(
        query,
        keys,
        bank,
        rows,
        weights,
        temperature=0.3,
        form=form,
        candidates=candidates,
        neighbours=mixed,
        normalise=normalised,
    )
    view = without_neighbours(query, 5 + int(candidates.counts.sum()))
    view = view._replace(
        scores=torch.zeros(5, 3), neighbour_ids=rows, weights=weights, counts=torch.ones(12)
    )
    settings = dict(method="snclr", form=form, temperature=0.3, normalised=normalised)
    metrics = step_metrics(loss, view, torch.arange(5), None, **settings)
    assert metrics["loss_ratio"] == pytest.approx(1, rel=1e-10)


def test_weights_above_the_candidates_have_no_chance_level_under_the_log():
    assert loss_at_chance("snclr", "log_of_sum", 0.2, 2, 2.0) is None
    assert loss_at_chance("snclr", "log_of_sum", 0.2, 2, 3.0) is None


@pytest.mark.parametrize("form", FORMS)
def test_loss_at_chance_is_mocov3s_in_either_form(form):
    query, keys, _, _ = same_cosines(0.5)
    loss = 2 * mocov3_loss(query, keys, temperature=0.3).item()
    assert loss_at_chance("mocov3", form, 0.3, 5, 1.0) == pytest.approx(loss, rel=1e-10)
    assert loss_at_chance("snclr", form, 0.3, 5, 1.0) == pytest.approx(loss, rel=1e-10)


def test_loss_at_chance_is_nnclrs():
    query, keys, _, _ = same_cosines(0.5)
    loss = nnclr_loss(query, keys, temperature=0.3).item()  # the mean of the directions
    assert loss_at_chance("nnclr", "sum_of_logs", 0.3, 5, 2.0) == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("filled", [1, 12])
def test_loss_at_chance_is_mocov2s(filled):
    query, keys, bank, _ = same_cosines(0.5)
    loss = mocov2_loss(query, keys, bank, torch.arange(12) < filled, temperature=0.3).item()
    assert loss_at_chance("mocov2", "sum_of_logs", 0.3, 1 + filled, 1.0) == pytest.approx(
        loss, rel=1e-10
    )


@pytest.mark.parametrize("method", ["snclr", "mocov3", "nnclr", "mocov2"])
def test_single_candidate_has_no_chance_level_and_no_ratio(method):
    assert loss_at_chance(method, "sum_of_logs", 0.2, 1, 1.0) is None
    view = without_neighbours(torch.randn(1, 8), num_candidates=1)
    metrics = step_metrics(
        torch.tensor(0.0),
        view,
        torch.arange(1),
        None,
        method=method,
        form="log_of_sum",
        temperature=0.2,
    )
    assert metrics["loss_ratio"] is None and metrics["loss"] == 0


# -- metrics.jsonl ---------------------------------------------------------------------------------

FIRST = [
    '{"step": 0, "knn_top1": 31.5}\n',
    '{"epoch":1,  "step":5, "loss": 1.50}\n',
    '{"step": 10, "note": "é"}\n',
]


def cut(path, content, step):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run_log.cut_back(str(path), step)
    return path.read_bytes().decode()


@pytest.mark.parametrize("step, left", [(0, 1), (4, 1), (5, 2), (9, 2), (10, 3), (99, 3)])
def test_lines_of_later_steps_are_dropped_and_earlier_ones_stay_byte_for_byte(step, left, tmp_path):
    assert cut(tmp_path / "metrics.jsonl", "".join(FIRST), step) == "".join(FIRST[:left])


@pytest.mark.parametrize(
    "torn",
    [
        '{"step": 3, "lo',
        '{"step": 3}',
        "{",
        '{"step": 3, "loss": 1.2',
        b"\xff\xfe",
        b'{"step": 3, "note": "\xc3',
    ],
)
def test_torn_last_line_is_dropped(torn, tmp_path):
    torn = torn if isinstance(torn, bytes) else torn.encode()
    assert cut(tmp_path / "metrics.jsonl", "".join(FIRST).encode() + torn, 99) == "".join(FIRST)


@pytest.mark.parametrize(
    "odd",
    ["[1, 2]", "3", '"step"', "null", "", '{"loss": 1}', '{"step": "3"}', '{"step": null}', "text"],
)
def test_lines_that_are_no_object_with_a_step_are_dropped(odd, tmp_path):
    assert (
        cut(tmp_path / "metrics.jsonl", FIRST[0] + odd + "\n" + FIRST[1], 99) == FIRST[0] + FIRST[1]
    )


def test_later_lines_are_dropped_at_any_position(tmp_path):
    assert cut(tmp_path / "metrics.jsonl", FIRST[0] + FIRST[2] + FIRST[1], 5) == FIRST[0] + FIRST[1]


def test_cutting_back_leaves_no_other_file(tmp_path):
    cut(tmp_path / "metrics.jsonl", FIRST[0], 3)
    run_log.cut_back(str(tmp_path / "absent.jsonl"), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_each_step_is_logged_once_after_a_crash_and_a_resume(tmp_path):
    for first, last, resumed in ((1, 7, 0), (5, 9, 4)):
        log = run_log.Log(str(tmp_path), step=resumed, enabled=True)
        for step in range(first, last):
            log.line({"epoch": 1, "step": step, "loss": step / 3, "loss_ratio": None})
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0] == {"epoch": 1, "step": 1, "loss": 0.333333, "loss_ratio": None}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = run_log.Log(str(tmp_path), step=0, enabled=False)
    bar = log.progress(3, 0, "epoch")
    bar.update()
    log.line({"step": 1})
    log.say("hello")
    bar.close()
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


# -- printed lines ---------------------------------------------------------------------------------


def test_settings_are_saved_with_command_versions_and_commit(tmp_path):
    save_settings(str(tmp_path), Namespace(topk=3, data=None), {"world_size": 2})
    settings = json.loads((tmp_path / "args.json").read_text())
    assert (settings["topk"], settings["data"], settings["world_size"]) == (3, None, 2)
    assert {"command", "versions", "git"} <= set(settings)


@pytest.mark.parametrize(
    "done, dataset, expected",
    [
        (True, "embedded", "next: train on your own images"),
        (
            True,
            "tree",
            "python -m snclr.visualize checkpoint_last.pth.tar '/my photos' --dataset tree "
            "--on-bad-image skip",
        ),
        (False, "embedded", "--resume auto"),
    ],
)
def test_last_lines_report_the_result_and_the_next_commands(done, dataset, expected, tmp_path):
    lines = [
        {"epoch": 0, "step": 0, "raw_pixels_knn_top1": 20.04, "knn_top1": 30.0},
        {"epoch": 2, "step": 8, "knn_top1": 55.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = Namespace(dataset=dataset, data="/my photos", on_bad_image="skip")
    printed = final_lines(args, str(tmp_path), "checkpoint_last.pth.tar", done)
    assert "raw pixels 20.0 %, untrained 30.0 %, epoch 2: 55.5 %" in printed
    assert expected in printed


def test_farewell_without_evaluation_does_not_speak_of_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "loss": 2.0}\n')
    args = Namespace(dataset="embedded")
    assert "kNN" not in final_lines(args, str(tmp_path), "", done=True)


@pytest.mark.parametrize(
    "ratio, purity, expected", [(0.5, None, "(0.50 of chance)"), (None, 0.25, "purity 0.25")]
)
def test_training_line_shows_the_known_metrics(ratio, purity, expected):
    metrics = dict(
        epoch=1,
        step=5,
        loss=1.5,
        loss_ratio=ratio,
        lr=1e-3,
        images_per_s=10.0,
        data_wait=0.1,
        feature_std=0.9,
    )
    if purity is not None:
        metrics["neighbour_purity"] = purity
    line = describe(metrics, 10, 50, images_left=36_000)
    assert line.endswith("60 min left")
    assert describe(metrics, 10, 50, images_left=90_000).endswith("2.5 h left")
    assert line.startswith("epoch 1/10  step 5/50  loss 1.500") and expected in line
    assert ("chance" in line) == (ratio is not None) and ("purity" in line) == (purity is not None)


def test_waits_are_the_time_inside_the_blocks_since_the_last_call(monkeypatch):
    clock = iter([1.0, 1.5, 7.0, 7.25, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    waits, measured = Waits(torch.device("cpu")), []
    for blocks in (2, 1, 0):
        for _ in range(blocks):
            with waits:
                pass
        measured.append(waits.seconds())
    assert measured == [0.75, 1.0, 0]


def test_waits_on_a_gpu_are_between_marks_in_its_own_work(monkeypatch):
    class Event:
        """An event 2 ms after the one before it on the GPU, whatever the host does."""

        passed = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.passed += 2
            self.at = Event.passed

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = Waits(torch.device("cuda"))
    for _ in range(3):
        with waits:
            pass
    assert waits.seconds() == pytest.approx(0.006) and waits.seconds() == 0
