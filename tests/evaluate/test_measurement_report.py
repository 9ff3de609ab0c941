"""The report: its JSON, its tables, its Markdown, and the sheet."""

import json

import pytest

from gobelin import scenes
from gobelin.evaluate.benchmark import Benchmark, benchmark_report
from gobelin.evaluate.caption_sensitivity import CaptionSensitivity
from gobelin.evaluate.image_list import requested_images
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.evaluate.retrieval import Retrieval
from gobelin.evaluate.sanity_checks import run_sanity_checks
from gobelin.evaluate.scored_images import score_images

WORLD = scenes.CORE
REQUESTS = requested_images(WORLD, limit=12, count=1)


@pytest.fixture(scope="module")
def exhibits(painters):
    return {
        name: score_images(REQUESTS, (painters[name](each.prompt, WORLD) for each in REQUESTS), WORLD)
        for name in ("perfect", "swapping")
    }


@pytest.fixture(scope="module")
def content(exhibits):
    benchmark = Benchmark(
        model="mine",
        world="core",
        settings={"sampler": "ddim", "guidance": 3.0},
        images=exhibits["swapping"],
        sanity_checks=run_sanity_checks(None, WORLD, each=2),
        retrieval=Retrieval(correct=Share.of([True, False]), chance=0.2, by_kind={"colour": Share.of([True] * 3)}),
        caption_sensitivity=[
            CaptionSensitivity(kind="colour", first_timestep=100, last_timestep=399, rise=0.25, margin=0.01, n=7)
        ],
    )
    return json.loads(json.dumps(benchmark.to_json(), allow_nan=False))


def test_the_json_has_every_score_and_control(content):
    assert {(row["split"], row["task"]): row["correct"]["value"] for row in content["scores"]}["dev", "position"] == 0
    assert [(mean["split"], mean["tasks"]) for mean in content["means"]] == [("dev", 6), ("heldout", 4)]
    assert {row["control"] for row in content["controls"]} == {"captions shuffled", "attributes swapped"}
    assert content["images"] == len(REQUESTS)
    assert all(gate["passed"] for gate in content["sanity_checks"]["gates"])


def test_the_markdown_says_what_a_reader_needs(content):
    report = benchmark_report(content)
    text = report.markdown(level=2)
    assert text.startswith("## Scores of mine\n\nWorld core, 132 images: sampler ddim, guidance 3.\n")
    assert "| attribute binding | held in (dev) | 0.000 [0.000, 0.242] |" in text
    assert "| **mean of 6 tasks** | **held in (dev)** | **0.500 [" in text
    assert "Worst task: held in (dev), counting 0.000 [" in text
    assert "GenEval's own numbers come from another world" in text
    assert "| attributes swapped | position | held out | 1.000 [" in text
    assert "| all | 0.500 [" not in text.replace("**", "x")
    assert "| **all** | **0.500 [" in text
    assert "| colour | +25.00% ± 1.00% | 7 captions |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert f"### {table.title}" in text


def test_without_an_image_encoder_there_is_no_retrieval_table(content):
    titles = [table.title for table in benchmark_report({**content, "retrieval": None}).tables]
    assert len(titles) == 4
    assert not any("Retrieval" in title for title in titles)


def test_a_gate_that_fails_stands_out(content):
    broken = json.loads(json.dumps(content))
    broken["sanity_checks"]["gates"][0]["passed"] = False
    assert benchmark_report(broken).tables[-1].rows[0][-1] == "NO"


def test_rows_that_sum_up_are_bold_and_notes_stand_beneath():
    table = ReportTable(title="t", columns=("a", "b"), rows=[("1", "2"), ("3", "")], bold=frozenset([1]), note="n")
    text = Report(title="r", description="d", tables=[table]).markdown()
    assert text == "# r\n\nd\n\n## t\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| **3** |  |\n\nn\n"


def test_what_there_was_too_little_of_is_null_and_a_dash():
    nothing, one = Mean.of([]), Mean.of([[0.5]])
    assert as_json({"means": [nothing, one]}) == {
        "means": [{"value": None, "margin": None, "n": 0}, {"value": 0.5, "margin": None, "n": 1}]
    }
    assert [mean_cell(mean) for mean in (None, as_json(nothing), as_json(one))] == ["–", "–", "0.500"]
    assert mean_cell(as_json(Mean.of([[0.0], [1.0]]))) == "0.500 ± 0.980"
    assert share_cell(as_json(Share.of([]))) == "–"
    assert share_cell(as_json(Share.of([True] * 8 + [False] * 2))) == "0.800 [0.490, 0.943]"
