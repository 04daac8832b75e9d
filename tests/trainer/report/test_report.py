"""The report of a made-up experiment, read back: what it must say, that it needs nothing else, the holes it shows."""

import copy
import html
import html.parser
import json
import re
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests.fixtures.worlds import LENGTHS, World, grid, row, survey_was_right
from trainer.report import document
from trainer.report.document import Block, Cell, Fold, Heading, Points, Table, Text, to_html, to_markdown
from trainer.report.hypotheses import judge
from trainer.report.labels import duration, percentage_points
from trainer.report.report import main, write
from trainer.report.results import ReportError, Results
from trainer.report.sections.summary import OVERVIEW_ROWS, overview

PROTOCOLS, CONVENTIONS = ["full", "uniform-100"], ["list", "single"]
METRICS = ["NDCG@1", "NDCG@5", "NDCG@10", "Recall@5", "Recall@10", "MRR"]


def results_of(rows, truth=survey_was_right, *, protocols=PROTOCOLS, conventions=CONVENTIONS, random=0):
    """What an experiment over made-up rows would write: numbers drawn, all else as the contract has it."""
    world = World(rows, truth, random=random)
    rng = np.random.default_rng(random)

    def matrix(name, protocol, convention, metric):
        return world.values[name] * (1 if protocol == "full" else 1.5) * (1 if convention == "list" else 0.9)

    written = []
    for one in rows:
        values = {
            p: {
                c: {
                    m: {"mean": float(v.mean()), "seeds": v.mean(1).tolist()}
                    for m, v in ((m, matrix(one["id"], p, c, m)) for m in METRICS)
                }
                for c in conventions
            }
            for p in protocols
        }
        runs = [trained(run["seed"], one, rng) for run in one["seeds"]]
        text = {"label": one["id"].replace("/", " "), "reads": "target", "reason": "", "metrics": values}
        written.append(text | one | {"seeds": runs})
    return {
        "experiment": "made-up",
        "preset": "cpu",
        "code": {"commit": "0123abc", "dirty": True},
        "machine": "2 cores",
        "started": "2026-01-02 03:04",
        "finished": "2026-01-02 05:06",
        "data": {
            "lake": "lake",
            "release": 4,
            "versions": {"sequences": 3, "items": 2},
            "split": "last-5",
            "part": "test",
            "source_domain": "src",
            "target_domain": "tgt",
            "evaluated_users": len(LENGTHS),
            "domains": [
                domain("all", 6_040, 3_416, 165.5),
                domain("src", 6_040, 2_300, 120.0),
                domain("tgt", 6_038, 1_116, 45),
            ],
        },
        "protocols": protocols,
        "conventions": conventions,
        "metrics": METRICS,
        "seeds": [1, 2, 3],
        "rows": written,
        **judge(rows, matrix, LENGTHS, protocols=protocols, conventions=conventions, metric="NDCG@10"),
    }


def domain(name, users, items, length):
    return {
        "domain": name,
        "users": users,
        "items": items,
        "items_with_knowledge": items // 2,
        "interactions": int(users * length),
        "average_length": length,
    }


def trained(seed, one, rng):
    epochs = int(rng.integers(15, 30))
    scores = 0.2 * (1 - np.exp(-np.arange(1, epochs + 1) / 5)) + rng.normal(0, 0.003, epochs)
    losses = 4 + 3 * np.exp(-np.arange(1, epochs + 1) / 6) + rng.normal(0, 0.02, epochs)
    return {
        "seed": seed,
        "run": f"run{seed}",
        "folder": "runs/x",
        "model_hash": "ab" * 32,
        "parent_hash": "cd" * 32,
        "parameters": 1_234_567,
        "epochs": epochs,
        "best_epoch": int(scores.argmax()) + 1,
        "seconds": 754.0,
        "pretrain_seconds": 4_000.0 if one["transfer"] not in (None, "none") else None,
        "items_per_second": 150_000.0,
        "validation": float(scores.max()),
        "curve": [
            {"epoch": n + 1, "loss": float(losses[n]), "validation": float(scores[n]) if n % 2 else None}
            for n in range(epochs)
        ],
    }


def whole_grid():
    return [
        *grid(),
        row("bert4rec") | {"id": "joint/bert4rec/plain", "kind": "joint"},
        row("bert4rec") | {"id": "bert4rec/none/-/plain/next_item", "kind": "extra", "task": "next_item"},
        row("bert4rec", seeds=()) | {"id": "popularity", "kind": "baseline", "model": None, "transfer": None},
    ]


@pytest.fixture(scope="module")
def results():
    return results_of(whole_grid())


@pytest.fixture(scope="module")
def small_results():
    return results_of(grid(models=("bert4rec",))[:4], protocols=["full"], conventions=["list"])


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    page = write(results, tmp_path_factory.mktemp("report"))
    return page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8"), page.parent


class Balanced(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    found = Balanced()
    found.feed(page)
    assert not found.open
    return found.seen


def test_the_page_is_whole_and_needs_nothing_else(written):
    page, _, _ = written
    tags = parsed(page)
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object"}
    links = [
        value for _, attributes in tags for name, value in attributes.items() if name in ("href", "src", "xlink:href")
    ]
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"url\((?!#)|@import", page)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_pictures_take_the_ink_of_the_page(written):
    page, _, _ = written
    inline = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(inline) == 1 + 4 + 1 + 2, "overview, gains by protocol and convention, by length, curves by model"
    assert all("var(--ink)" in svg and "#333333" not in svg for svg in inline)


def test_markdown_says_the_same_and_its_pictures_are_there(written):
    page, text, folder = written
    for heading in re.findall(r"<h[23]>(.*?)</h[23]>", page):
        assert f"## {html.unescape(heading)}" in text.replace("\\", "")
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 8
    assert all((folder / name).read_text().startswith("<svg") for name in pictures)
    numbers = re.compile(r"[+-]?\d+\.\d\d")
    bare = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert sorted(numbers.findall(re.sub("<[^>]*>", " ", bare))) == sorted(numbers.findall(text))


def table_under(text, heading):
    """Rows (lists of cells) of the first Markdown table after a heading."""
    lines = text[text.index(heading) :].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("*", "").replace("\\", "") for cell in line.strip("|").split("|")])
    return rows


def test_table_2_stands_beside_the_surveys(written, results):
    rows = table_under(written[1], "## Table 2")
    assert rows[0] == ["%", "NDCG@1", "NDCG@5", "NDCG@10", "Recall@5", "Recall@10"]
    assert len(rows) == 2 + 2 + 20
    titles = [row[0] for row in rows if not row[1]]
    assert titles == ["BERT4Rec (uniform-100, list)", "Caser (uniform-100, single)"]
    deep = next(row for row in rows if row[0] == "deep, masked item + metadata")
    theirs = [re.search(r"\((.*)\)", cell)[1] for cell in deep[1:]]
    assert theirs == ["33.54", "35.84", "42.95", "39.04", "54.73"]
    (own,) = [one for one in results["rows"] if one["id"] == "bert4rec/deep/masked_item/knowledge"]
    mean = own["metrics"]["uniform-100"]["list"]["NDCG@10"]["mean"]
    assert deep[3].startswith(f"{100 * mean:.2f} ")


def test_verdicts_gains_and_data_are_told(written, results):
    text = written[1].replace("\\", "")
    assert "Deep transfer beats shallow for BERT4Rec: supported" in text
    verdicts = table_under(text, "## The survey's observations")
    assert len(verdicts) == 2 + 7
    assert [cell.split(" (")[0] for cell in verdicts[2][1:5]] == ["supported"] * 4
    data = table_under(text, "## Table 1")
    assert data[2][:3] == ["all", "6,040 (6,040)", "3,416 (3,416)"]
    assert data[4][2] == "1,116 (1,067)", "the target is told by its role, not its name"
    cost = table_under(text, "## Cost")
    assert "12 min 34 s" in cost[4]
    assert "1 h 06 min" in next(row for row in cost if row[0].startswith("deep"))
    lengths = table_under(text, "## Gain by length")
    assert lengths[0][1] == "0 items: 20 users"
    assert "commit 0123abc with changes not committed" in text
    best = max(
        (one for one in results["rows"] if one["kind"] == "model" and one["transfer"] != "none"),
        key=lambda one: one["metrics"]["full"]["list"]["NDCG@10"]["mean"],
    )
    assert best["id"] == "caser/shallow/next_item/knowledge"
    assert "The best transfer, Caser, shallow, next item + metadata, has" in text
    assert "above the best simple baseline (popularity" in text


def test_how_soon_a_row_is_as_good(small_results, tmp_path):
    """As what it is compared with was at its best, seed by seed; epochs that were not validated say nothing."""
    results = copy.deepcopy(small_results)
    gain = results["comparisons"][0]
    ours, theirs = (next(r for r in results["rows"] if r["id"] == gain[name]) for name in ("row", "against"))
    for run in theirs["seeds"]:
        run["curve"] = curve(0.1, None, 0.2, 0.15)
    for run, scores in zip(ours["seeds"], ((0.1, 0.2, 0.3), (0.25, 0.1), (0.19, None, 0.19)), strict=True):
        run["curve"] = curve(*scores)
    page = write(results, tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    cost = page[page.index("## Cost") :]
    assert "| 1.5 epochs in 2 of 3 |" in cost
    for run in ours["seeds"]:
        run["curve"] = curve(0.1)
    page = write(results, tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    assert "| never |" in page[page.index("## Cost") :]


def test_many_rows_of_ones_own_have_a_picture_a_family(tmp_path):
    """Rows that are compared with one, whichever way round, and no more in a picture than it can tell apart."""
    ids = [(f"{family}{n}", f"{family}{n - 1}" if n else None) for family in "ab" for n in range(4)]
    own = [
        row("bert4rec")
        | {"id": name, "kind": "custom", "label": f"row {name}", "against": against, "pretrain_task": None}
        for name, against in ids
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(results_of(own), tmp_path)
    pictures = {path.name for path in tmp_path.glob("*.svg")}
    assert {"report-curves-0-0.svg", "report-curves-0-1.svg"} <= pictures
    assert "report-curves-0-2.svg" not in pictures
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "every seed a line: row a0](report-curves-0-0.svg)" in text
    assert "every seed a line: row b0](report-curves-0-1.svg)" in text


def curve(*scores):
    return [{"epoch": n, "loss": 1.0, "validation": score} for n, score in enumerate(scores, 1)]


def test_the_first_line_says_what_the_report_is_about(small_results, tmp_path):
    results = copy.deepcopy(small_results)
    results["data"] |= {"dataset": "The log in shop/logs", "held_out": 3}
    page = write(results, tmp_path).read_text(encoding="utf-8")
    assert re.findall("<p.*?</p>", page)[0] == (
        f'<p class="lead">The log in shop/logs. From domain src to tgt: the 3 held-out items of {len(LENGTHS)} users '
        "(split last-5, test part) ranked among all items that the user has not taken. All 12 runs done: 4 rows, 3 "
        "seeds.</p>"
    )
    body = page[page.index("<body>") :]
    assert body.index("<svg") < body.index("<h2>"), "one picture comes before every section"
    results["rows"] = [one | {"transfer": "none"} for one in results["rows"]]
    results["data"] |= {"held_out": 1, "target_domain": "all"}
    assert '<p class="lead">The log in shop/logs. On domain all: the 1 held-out item of' in (
        write(results, tmp_path).read_text(encoding="utf-8")
    )


def test_seeds_that_are_missing_are_counted_and_listed_last(small_results, tmp_path):
    results = copy.deepcopy(small_results)
    for one in results["rows"]:
        one["seeds"] = one["seeds"][:1]
    results["rows"].append(
        copy.deepcopy(results["rows"][1])
        | {"id": "x", "status": "missing", "seeds": [], "metrics": {}, "reason": "not requested (`rows`)"}
    )
    text = write(results, tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    assert "4 of 12 runs done, none of seeds 2, 3; the end of this page lists what is missing" in text
    assert re.findall("^## (.*)$", text, re.MULTILINE)[-1] == "Missing runs"
    assert "- No seed 2, 3 (4 rows): BERT4Rec, from scratch; " in text
    assert "With one seed they and the verdicts are about users only" in text


def test_page_pictures_and_tables_have_one_minus_sign(written):
    page, text, folder = written
    everything = [page, text, *(path.read_text(encoding="utf-8") for path in folder.glob("*.svg"))]
    assert not any("−" in one or "&#8722;" in one for one in everything)
    assert re.search(r"-\d\.\d\d", text)


def test_a_gain_that_rounds_to_zero_has_no_sign():
    assert [percentage_points(value) for value in (0.00004, -0.00004, 0.0, 0.01, -0.01)] == [
        "0.00",
        "0.00",
        "0.00",
        "+1.00",
        "-1.00",
    ]


def test_the_overview_shows_the_best_of_many_rows(written, results):
    """The best of each model, task and transfer, and two baselines at most."""
    alt = "![NDCG@10 of the best rows and of simple baselines, full, list](report-overview.svg)"
    assert alt in written[1]
    shown = overview(Results(results))
    assert len(shown) == OVERVIEW_ROWS - 3 + 1, "2 models by 3 transfers, a joint model, an extra; a baseline"
    means = [one.mean for one in shown if not one.is_baseline]
    assert means == sorted(means, reverse=True)
    assert sum(one.is_baseline for one in shown) == 1
    assert all(len(one.seeds) == 3 for one in shown if not one.is_baseline)


def test_missing_runs_are_named_and_not_filled(tmp_path):
    rows = whole_grid()
    gone = "bert4rec/deep/next_item/plain"
    rows = [
        one | {"status": "missing", "reason": "loss of seed 2 <became> NaN", "seeds": []} if one["id"] == gone else one
        for one in rows
    ]
    rows[0] = rows[0] | {"seeds": [{"seed": 1}, {"seed": 3}]}
    page = write(results_of(rows, protocols=["full"]), tmp_path).read_text(encoding="utf-8")
    parsed(page)
    assert "Loss of seed 2 &lt;became&gt; NaN (1 row): BERT4Rec, deep, next item" in page
    assert "No seed 2 (1 row): BERT4Rec, from scratch" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    deep = next(row for row in table_under(text, "## Table 2") if row[0] == "deep, next item")
    assert [cell.split()[0] for cell in deep[1:]] == ["missing"] * 5
    assert "7 of 8 pairs" in text


def test_an_experiment_of_one_model_and_seed_on_other_data(tmp_path):
    results = results_of(grid(models=("bert4rec",), seeds=(1,)), protocols=["full"])
    results["seeds"] = [1]
    for one in results["data"]["domains"]:
        one["users"] = 500
    text = write(results, tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    assert "are about users only" in text
    assert "These data are not the survey's" in text
    assert not re.search(r"\(30\.07\)", text)
    verdicts = table_under(text, "## The survey's observations")
    assert not any("Caser" in row[0] for row in verdicts)  # no row of the experiment speaks of it
    assert "one seed" in verdicts[2][1]


def test_nothing_was_done(tmp_path):
    rows = [one | {"status": "missing", "reason": "no lake", "seeds": []} for one in grid()]
    page = write(results_of(rows), tmp_path).read_text(encoding="utf-8")
    parsed(page)
    assert page.count("no lake") >= 20
    verdicts = table_under((tmp_path / "report.md").read_text(encoding="utf-8"), "## The survey's observations")
    assert sum(row[1].startswith("unknown") for row in verdicts) == 7


def test_patches_stand_beside_whole_copies(small_results, tmp_path):
    whole, patched = {"mb": 363.0, "seconds": 4.2, "ms": 45.0}, {"mb": 53.14, "seconds": 3.3, "ms": 46.24}
    measured = {"seed": 1, "rows": [small_results["rows"][0]["id"], "gone"], "whole": whole, "patched": patched}
    told = small_results | {"patches": [measured | {"patches_mb": 2.0, "items_mb": 1.5}]}
    write(told, tmp_path / "with")
    table = table_under((tmp_path / "with" / "report.md").read_text(encoding="utf-8"), "## Patches beside whole copies")
    assert [row[1:] for row in table[-2:]] == [
        ["363.00 MB", "", "", "4.20 s", "45.0 ms"],
        ["53.14 MB", "2.00 MB", "1.50 MB", "3.30 s", "46.2 ms"],
    ]
    write(small_results | {"patches": []}, tmp_path / "without")
    assert "Patches beside" not in (tmp_path / "without" / "report.md").read_text(encoding="utf-8")


def test_names_of_users_of_the_platform_are_text_not_markup(small_results, tmp_path):
    odd = copy.deepcopy(small_results)
    odd["machine"] = odd["experiment"] = odd["data"]["lake"] = "<script>alert(1)</script> & | * _x_"
    odd["data"]["dataset"] = odd["rows"][1]["reason"] = odd["metrics"][0] = "'\"><script>alert(2)</script>"
    odd["rows"][1] |= {"status": "missing", "seeds": []}
    page = write(odd, tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "script" not in {tag for tag, _ in parsed(page)}
    odd["hypotheses"][0]["claim"] = odd["protocols"][0] = '" onload="alert(3)'
    for one in [*odd["hypotheses"], *odd["comparisons"], *odd["slices"]]:
        one["protocol"] = odd["protocols"][0]
    page = write(odd, tmp_path).read_text(encoding="utf-8")
    assert not [attributes for _, attributes in parsed(page) if "onload" in attributes]


def test_writing_again_gives_the_same_page(small_results, tmp_path):
    first, again = (write(small_results, tmp_path / name).read_text(encoding="utf-8") for name in "ab")
    assert first == again


def test_the_command_draws_kept_results(small_results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(small_results, allow_nan=False))
    assert main([str(tmp_path / "results.json"), "--folder", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "report.html")


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"experiment": "x"}'])
def test_other_files_are_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--folder", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: expected")
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_results_without_a_part_are_refused(small_results, tmp_path):
    with pytest.raises(ReportError, match="found none of slices"):
        write({key: value for key, value in small_results.items() if key != "slices"}, tmp_path)


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_template_shows_every_kind_of_block():
    template = (Path(document.__file__).parent / "page.html").read_text(encoding="utf-8")
    assert set(re.findall(r'kind == "(\w+)"', template)) == {kind.__name__ for kind in get_args(Block)}


def test_blocks_as_markdown_and_html():
    blocks = [
        Heading("A | b"),
        Text("1 < 2"),
        Points(["one", "two"]),
        Fold("more", [Table(["name", "x"], ["title", ["a_b", Cell("1.0", "2.0", "up")]])]),
    ]
    assert to_markdown("T", blocks).splitlines() == [
        "# T",
        "",
        r"## A \| b",
        "",
        r"1 \< 2",
        "",
        "- one",
        "- two",
        "",
        "**more**",
        "",
        "| name | x |",
        "| :-- | --: |",
        "| **title** |  |",
        r"| a\_b | **1.0** (2.0) |",
    ]
    page = to_html("T", blocks)
    parsed(page)
    assert "<p>1 &lt; 2</p>" in page
    assert '<td class="t">a_b</td><td><span class="up">1.0</span><small>2.0</small></td>' in page


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3_661, "1 h 01 min"), (float("nan"), "–")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
