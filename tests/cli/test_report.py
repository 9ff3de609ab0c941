"""``gobelin report``, as a user meets it."""

import pytest

from gobelin.cli.main import COMMANDS


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(COMMANDS, "report", COMMANDS.get("report", "write the page of a training run"))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "metrics.jsonl").write_text('{"stage": "unet", "step": 50, "loss": 0.5}\n')
    return tmp_path / "run"


def test_report_writes_the_page_and_says_where(gobelin, run, tmp_path):
    page = run / "training" / "report.html"
    assert gobelin("report", run) == (0, f"{page}\n", "")
    first = page.read_text(encoding="utf-8")
    (run / "training" / "metrics.jsonl").write_text('{"stage": "unet", "step": 90, "loss": 0.25}\n')
    assert gobelin("report", run, "--out", tmp_path / "new" / "mine.html")[0] == 0
    assert page.read_text(encoding="utf-8") == first
    assert "<td>90</td>" in (tmp_path / "new" / "mine.html").read_text(encoding="utf-8")
    assert gobelin("report", run)[0] == 0
    assert "<td>90</td>" in page.read_text(encoding="utf-8"), "it is made anew"


def test_what_cannot_be_reported_is_said_in_one_sentence(refused, run, tmp_path):
    status, sentence = refused("report", tmp_path)
    assert status == 1
    assert f"{tmp_path} holds no training run: give the folder that gobelin train --out wrote" in sentence
    status, sentence = refused("report", run, "--out", tmp_path)
    assert status == 2
    assert f"--out is {tmp_path}, a folder: give the name of a file, such as " in sentence
    assert refused("report")[0] == 2
