"""The report: its JSON, its tables and its Markdown."""

import json

import pytest

from gobelin import scenes
from gobelin.evaluate.benchmark import judged
from gobelin.evaluate.caption_sensitivity import Heard
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.picture_list import asked_for
from gobelin.evaluate.report import markdown, report, tables
from gobelin.evaluate.retrieval import Retrieval
from gobelin.evaluate.sanity_checks import check_instruments

WORLD = scenes.CORE
ASKED = asked_for(WORLD, limit=12, count=1)


@pytest.fixture(scope="module")
def exhibits(painters):
    return {
        name: judged(ASKED, (painters[name](each.prompt, WORLD) for each in ASKED), WORLD)
        for name in ("perfect", "swapping")
    }


@pytest.fixture(scope="module")
def content(exhibits):
    found = Retrieval(correct=Share.of([True, False]), chance=0.2, by_kind={"colour": Share.of([True] * 3)})
    instruments = check_instruments(None, WORLD, each=2)
    settings = {"sampler": "ddim", "guidance": 3.0}
    heard = [Heard(kind="colour", first_timestep=100, last_timestep=399, rise=0.25, margin=0.01, n=7)]
    made = report(exhibits["swapping"], instruments, found, heard, model="mine", world="core", settings=settings)
    return json.loads(json.dumps(made, allow_nan=False))


def test_the_json_has_every_score_and_control(content):
    assert {(row["split"], row["task"]): row["correct"]["value"] for row in content["scores"]}["dev", "position"] == 0
    assert [(mean["split"], mean["tasks"]) for mean in content["means"]] == [("dev", 6), ("heldout", 4)]
    assert {row["control"] for row in content["controls"]} == {"captions shuffled", "attributes swapped"}
    assert content["pictures"] == len(ASKED)
    assert all(gate["passed"] for gate in content["instruments"]["gates"])


def test_the_markdown_says_what_a_reader_needs(content):
    text = markdown(content, level=2)
    assert text.startswith("## Scores of mine\n\nWorld core, 132 pictures: sampler ddim, guidance 3.\n")
    assert "| attribute binding | held in (dev) | 0.000 [0.000, 0.242] |" in text
    assert "| **mean of 6 tasks** | **held in (dev)** | **0.500 [" in text
    assert "Worst task: held in (dev), counting 0.000 [" in text
    assert "GenEval's own numbers are of another world" in text
    assert "| attributes swapped | position | held out | 1.000 [" in text
    assert "| all | 0.500 [" not in text.replace("**", "x")
    assert "| **all** | **0.500 [" in text
    assert "| colour | +25.00% ± 1.00% | 7 captions |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    for table in tables(content):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert f"### {table.title}" in text


def test_without_an_image_encoder_there_is_no_retrieval_table(content):
    titles = [table.title for table in tables({**content, "retrieval": None})]
    assert len(titles) == 4
    assert not any("Retrieval" in title for title in titles)


def test_a_gate_that_fails_stands_out(content):
    broken = json.loads(json.dumps(content))
    broken["instruments"]["gates"][0]["passed"] = False
    assert tables(broken)[-1].rows[0][-1] == "NO"
