import base64
import json
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser

import pytest
from test_ranks import SMALL, write_images

import main_snclr
from snclr import report as command
from snclr.pictures import curves, report
from snclr.pictures.runs import load, mean_and_deviation
from snclr.running.errors import RunError, UsageError

PIXEL = b"\x89PNG\r\n\x1a\n of which the report reads nothing"
VOID = {"meta", "link", "img", "path", "br"}  # the last of SVG, closed by a slash


class Page(HTMLParser):
    """Checks that tags nest, and collects tables, sources and words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def write_run(folder, knn=50.0, pictures=(), results=None, lines=(), **settings):
    """A workdir as main_snclr.py leaves it, of four steps in two epochs."""
    folder.mkdir(parents=True)
    about = {
        "command": "python main_snclr.py --seed 1",
        "versions": {"torch": "2.9"},
        "git": "abc",
        "world_size": 1,
    }
    defaults = {
        "method": "snclr",
        "arch": "resnet8",
        "dataset": "embedded",
        "topk": 5,
        "seed": 0,
        "workdir": str(folder),
    }
    (folder / "args.json").write_text(json.dumps({**defaults, **settings, **about}))
    records = [{"epoch": 0, "step": 0, "knn_top1": 20.0, "raw_pixels_knn_top1": 15.0}]
    for step in range(1, 5):
        records.append(
            {
                "epoch": (step + 1) // 2,
                "step": step,
                "loss": 9.0 - step,
                "loss_ratio": 1 - step / 10,
                "images_per_s": 10.0 * step,
            }
        )
    records.append({"epoch": 2, "step": 4, "knn_top1": knn})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*records, *lines])
    )
    for name in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / name).write_bytes(PIXEL + name.encode())
    if results is not None:
        (folder / "probe").mkdir()
        (folder / "probe/results.json").write_text(json.dumps(results))
    return folder


def page_of(*folders):
    return Page(report.page([load(str(folder)) for folder in folders]))


def test_one_run_is_reported_by_its_last_evaluation_and_its_last_epoch(tmp_path):
    page = page_of(write_run(tmp_path / "run", results={"linear_top1": 61.5, "encoder": "online"}))
    heads, row = page.tables[0]
    cells = dict(zip(heads, row, strict=True))
    assert (cells[""], cells["runs"]) == ("run", "1")
    assert (cells["kNN top-1 %"], cells["untrained %"], cells["raw pixels %"]) == (
        "50.0",
        "20.0",
        "15.0",
    )
    assert (cells["loss / chance"], cells["images/s"], cells["linear probe %"]) == (
        "0.650",
        "25.0",
        "61.5",
    )
    assert "purity" not in cells  # no run has one
    assert page.tables[1][1][:2] == [str(tmp_path / "run/probe"), "61.5"]
    words = "".join(page.words)
    assert (
        "python main_snclr.py --seed 1" in words
        and "torch 2.9" in words
        and "git abc" in words
        and '"topk": 5' in words
    )


def test_the_probe_of_a_baseline_is_not_that_of_the_run(tmp_path):
    run = write_run(tmp_path / "run", results={"linear_top1": 61.5, "encoder": "online"})
    for encoder in ("pixels", "untrained"):
        (run / f"a_{encoder}").mkdir()  # before probe/ in the alphabet
        content = json.dumps({"linear_top1": 25.0, "encoder": encoder})
        (run / f"a_{encoder}/results.json").write_text(content)
    page = page_of(run)
    assert dict(zip(*page.tables[0], strict=True))["linear probe %"] == "61.5"
    assert [row[1] for row in page.tables[1][1:]] == ["25.0", "25.0", "61.5"]


def test_runs_that_differ_only_in_their_seed_are_one_row_with_mean_and_deviation(tmp_path):
    accuracies = [80.0, 82.5, 87.0]
    folders = [
        write_run(tmp_path / f"a{seed}", knn, seed=seed) for seed, knn in enumerate(accuracies)
    ]
    folders += [write_run(tmp_path / "b", 70.0, seed=0, topk=9)]
    page = page_of(*folders)
    rows = {row[0]: row for row in page.tables[0][1:]}
    assert set(rows) == {"topk 5", "topk 9"} and [row[1] for row in rows.values()] == ["3", "1"]
    assert (
        rows["topk 5"][2]
        == f"{statistics.fmean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"
        == "83.2 ± 3.5"
    )
    assert rows["topk 9"][2] == "70.0"


def test_runs_of_one_setting_are_named_by_what_their_folders_have_in_common(tmp_path):
    page = page_of(*(write_run(tmp_path / f"small-seed{seed}", seed=seed) for seed in range(3)))
    assert [row[:2] for row in page.tables[0][1:]] == [["small", "3"]]


@pytest.mark.parametrize(
    "values, text",
    [
        ([], ""),
        ([None], ""),
        ([0.0], "0.00"),
        ([0.12345, None], "0.123"),
        ([1234.5, 1235.5], "1235 ± 1"),
    ],
)
def test_numbers_have_the_digits_that_their_deviation_allows(values, text):
    assert mean_and_deviation(values) == text


def test_what_a_run_may_change_does_not_set_runs_apart(tmp_path):
    folders = [
        write_run(tmp_path / "a", workers=1, print_freq=5),
        write_run(tmp_path / "b", workers=9, print_freq=7, seed=2),
    ]
    assert [row[1] for row in page_of(*folders).tables[0][1:]] == ["2"]


def test_many_differences_are_a_table_of_their_own(tmp_path):
    other = dict(topk=9, arch="vit_tiny", lr=0.1, epochs=3)
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", **other))
    assert [row[0] for row in page.tables[0][1:]] == ["a", "b"]
    heads, first, second = page.tables[1]
    assert dict(zip(heads, first, strict=True)) == {
        "": "a",
        "arch": "resnet8",
        "topk": "5",
        "lr": "",
        "epochs": "",
    }
    assert dict(zip(heads, second, strict=True)) == {
        "": "b",
        **{name: str(value) for name, value in other.items()},
    }


def test_curves_go_through_the_numbers_of_the_run(tmp_path):
    text = report.page([load(str(write_run(tmp_path / "run")))])
    svg = re.search(r'<svg[^>]*aria-label="loss".*?</svg>', text).group()
    (way,) = re.findall(r'stroke="#0072b2" d="M([^h"]*)"', svg)
    points = [tuple(map(float, point.split())) for point in way.split("L")]
    right, bottom = curves.WIDTH - 8, curves.HEIGHT - curves.BELOW - 8
    xs = [curves.LEFT + (right - curves.LEFT) * epoch / 2 for epoch in (0.5, 1, 1.5, 2)]
    ys = [8 + (bottom - 8) * share for share in (0, 1 / 3, 2 / 3, 1)]  # 8, 7, 6, 5
    assert points == [pytest.approx(point, abs=0.06) for point in zip(xs, ys, strict=True)]
    assert [float(tick) for tick in re.findall(r'text-anchor="end">([^<]*)', svg)] == [5, 6, 7, 8]


def test_further_terms_of_the_loss_have_curves(tmp_path):
    line = {"epoch": 1, "step": 2, "term_a<b": 0.5}
    text = report.page([load(str(write_run(tmp_path / "run", lines=[line])))])
    assert "<figcaption>term_a&lt;b</figcaption>" in text


def test_seeds_are_one_line_through_their_mean_in_a_band_from_the_lowest_to_the_highest(tmp_path):
    runs = [
        write_run(tmp_path / f"a{seed}", knn, seed=seed)
        for seed, knn in enumerate([30.0, 50.0, 40.0])
    ]
    runs += [write_run(tmp_path / "b", 60.0, topk=9)]
    text = report.page([load(str(run)) for run in runs])
    svg = re.search(r'<svg[^>]*aria-label="kNN.*?</svg>', text).group()
    bottom, top = curves.HEIGHT - curves.BELOW - 8, 8  # 20 and 60 percent

    def values(way):
        return [
            20 + 40 * (bottom - float(point.split()[1])) / (bottom - top)
            for point in way.split("L")
        ]

    (band,) = re.findall(r'class="band"[^>]* d="M([^Z]*)Z"', svg)
    assert values(band) == pytest.approx([20, 50, 30, 20], abs=0.1)
    assert [values(way) for way in re.findall(r'stroke="#\w+" d="M([^h"]*L[^h"]*)"', svg)] == [
        pytest.approx([20, 40], abs=0.1),
        pytest.approx([20, 60], abs=0.1),
    ]
    assert re.findall("<title>(.*?)</title>", svg) == ["topk 5", "topk 9"]


def test_of_many_differences_a_name_has_the_unusual_ones(tmp_path):
    ablations = [{}, {"topk": 9}, {"lr": 0.1}, {"epochs": 3, "topk": 1}, {"weights": "uniform"}]
    usual = {"lr": 0.2, "epochs": 8, "weights": "attention"}
    runs = [
        write_run(tmp_path / f"run-{number}", **{**usual, **changed})
        for number, changed in enumerate(ablations)
    ]
    names = [row[0] for row in page_of(*runs).tables[0][1:]]
    assert names == ["run-0", "topk 9", "lr 0.1", "topk 1, epochs 3", "weights uniform"]


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path):
    run = write_run(
        tmp_path / "run",
        pictures=["neighbours_0000002.png", "neighbours_0000003.png", "neighbours_0000004.png"],
    )
    page = page_of(run)
    prefix = "data:image/png;base64,"
    pictures = [
        address.removeprefix(prefix) for address in page.addresses if address.startswith(prefix)
    ]
    shown = [base64.b64decode(picture).removeprefix(PIXEL).decode() for picture in pictures]
    assert shown == ["neighbours_0000002.png", "neighbours_0000004.png"]  # before and after
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in report.STYLE and "@import" not in report.STYLE


def test_what_stands_in_the_files_is_words_and_never_markup(tmp_path):
    attack = '"><script>alert(1)</script>'
    run = write_run(
        tmp_path / "run",
        arch=attack,
        dataset=attack,
        note=attack,
        results={"linear_top1": 5, "encoder": attack},
    )
    other = write_run(tmp_path / "<b>other", topk=attack)
    text = report.page([load(str(run)), load(str(other))])
    assert "<script" not in text and "<b>" not in text
    Page(text)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        '{"step": 5}',
        '{"epoch": 2, "step": 5, "lo',
        '{"epoch": 2, "step": 5, "loss": NaN, "knn_top1": Infinity, "loss_ratio": "x", '
        '"feature_std": true}',
        '{"epoch": 2, "step": 5, "loss": null, "knn_top1": [1], "images_per_s": 1'
        + "0" * 400
        + "}",
        '{"epoch": "2", "step": {}}',
    ],
)
def test_lines_without_metrics_are_ignored(line, tmp_path):
    expected = page_of(write_run(tmp_path / "a" / "run")).tables[0]
    run = write_run(tmp_path / "b" / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line)
    assert page_of(run).tables[0] == expected


@pytest.mark.parametrize(
    "lines",
    ["", '{"epoch": 1, "step": 1, "loss": 2.0}\n', '{"epoch": 0, "step": 0, "knn_top1": 3}\n'],
)
def test_a_run_that_has_just_begun_is_reported_too(lines, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(lines)
    page_of(run)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3"])
def test_a_folder_without_a_run_is_answered_in_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(
        UsageError,
        match=r"holds no run \(no args.json that can be read\): give the --workdir of one",
    ):
        command.main([str(tmp_path)])


def test_settings_without_metrics_are_answered_in_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"has no metrics.jsonl"):
        command.main([str(run)])


def test_a_place_that_cannot_be_written_is_answered_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*nowhere"):
        command.main(
            [str(write_run(tmp_path / "run")), "--out", str(tmp_path / "nowhere" / "report.html")]
        )


def test_a_report_that_fails_is_a_line_at_the_end_of_a_run(tmp_path, monkeypatch):
    assert report.write_into(str(tmp_path)).startswith("no report: ")
    monkeypatch.setattr(report, "page", lambda runs: 1 / 0)
    assert report.write_into(str(write_run(tmp_path / "run"))) == "no report: division by zero"


# -- workdirs from others --------------------------------------------------------------------------


def images_of(page):
    return [source for source in page.addresses if source.startswith("data:image/png")]


def test_only_regular_png_files_are_embedded(tmp_path):
    run = write_run(tmp_path / "run", pictures=["neighbours_0000004.png"])
    assert len(images_of(page_of(run))) == 1
    secret = tmp_path / "secret"
    secret.write_bytes(PIXEL)
    last = run / "pictures" / "neighbours_0000009.png"
    for make in (
        lambda: last.symlink_to(secret),
        lambda: last.write_bytes(b"root:x:0:0"),
        lambda: os.mkfifo(last),
        lambda: (last.touch(), os.truncate(last, 2**40)),
        last.mkdir,
    ):
        make()
        assert len(images_of(page_of(run))) == 1  # the first picture
        last.rmdir() if last.is_dir() else last.unlink()


@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "probe/results.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "deep", "binary"])
def test_files_that_would_block_or_fill_the_memory_are_refused_at_once(name, kind, tmp_path):
    run = write_run(tmp_path / "run", results={"linear_top1": 61.5})
    path = run / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(b"[" * 100_000 if kind == "deep" else bytes(range(256)))
    if name == "args.json" or (name == "metrics.jsonl" and kind in ("fifo", "device", "sparse")):
        with pytest.raises(UsageError, match=f"no {name} that can be read"):
            load(str(run))
    else:
        page_of(run)


def test_settings_with_half_a_character_are_written(tmp_path):
    run = write_run(tmp_path / "run", arch="half \ud800")
    command.main([str(run)])
    assert "half ?" in (run / "report.html").read_text()


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    run = write_run(tmp_path / "run", results={"linear_top1": 61.5})
    for name in ("a", "b", "c"):
        (run / name).symlink_to("..")
        (run / "probe" / name).symlink_to("..")
    assert [folder for folder, _ in load(str(run)).results] == ["probe"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)])
def test_out_that_is_no_regular_file_is_refused(make, tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "out.html"
    make(out)
    before = out.lstat()
    with pytest.raises(UsageError, match=r"--out .*out\.html is not a regular file"):
        command.main([str(run), "--out", str(out)])
    assert (out.lstat().st_ino, out.lstat().st_mode) == (before.st_ino, before.st_mode)


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run that has ended."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    images = write_images(tmp_path_factory.mktemp("images"))
    main_snclr.main([str(images), *SMALL.split(), "--viz-freq", "1", "--workdir", str(workdir)])
    return workdir


def test_a_run_ends_by_leaving_its_report(finished):
    page = Page((finished / "report.html").read_text())
    assert len([address for address in page.addresses if address.startswith("data:image/png")]) == 2
    assert page.tables[0][0][2] == "kNN top-1 %" and len(page.tables[0]) == 2


@pytest.mark.parametrize("width", [360, 1300])
def test_a_browser_shows_it_without_console_messages(finished, width, tmp_path):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no chromium to open the report with")
    shutil.copy(finished / "report.html", tmp_path)
    look = "const d=this.contentDocument,i=[...d.images];"
    look += "document.title=[d.documentElement.scrollWidth,i.length,"
    look += "i.every(e=>e.naturalWidth>0),d.querySelectorAll('svg').length]"
    frame = tmp_path / "frame.html"  # windows are 500 px wide at least, frames are not
    frame.write_text(
        f'<iframe src="report.html" width="{width}" height="900" frameborder="0" '
        f'onload="{look}"></iframe>'
    )
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    command = [browser, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "CONSOLE" not in done.stderr
    needed, pictures, loaded, drawings = (
        re.search(r"<title>([^<]*)</title>", done.stdout).group(1).split(",")
    )
    assert int(needed) <= width and (pictures, loaded) == ("2", "true") and int(drawings) > 5
