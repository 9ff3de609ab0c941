"""Rows, peers, a session within its budget, and the processes in which rows are measured."""

import pytest
from PIL import Image

from gobelin.bench import session
from gobelin.bench.bench_chart import write_bench_chart
from gobelin.bench.growth import at_most, exponent, measure_growth
from gobelin.bench.measure import Limits
from gobelin.bench.peers import PEERS, Peer, find_peers
from gobelin.bench.process_contenders import run_python
from gobelin.bench.rows import ROWS, find_rows
from gobelin.bench.session import BenchPlan, run_bench
from gobelin.bench.workloads import refuse_unknown_contenders, workload_of
from gobelin.errors import UsageError


def plan(*names: str, budget: float = 1.0) -> BenchPlan:
    return BenchPlan(
        rows=find_rows(names), precisions=["float32"], peers=[], only=[], threads=1, rounds=3, budget=budget
    )


def test_rows_are_found_by_name_group_and_kind():
    assert [row.name for row in find_rows(["unet-32", "unet-64"])] == ["unet-64", "unet-32"]
    assert {row.name for row in find_rows(["growth"])} == {name for name in ROWS if name.startswith("growth-")}
    assert "train-tiny" in [row.name for row in find_rows(["train"])]
    with pytest.raises(UsageError, match="unknown row 'starup': did you mean 'start-up'"):
        find_rows(["starup"])


def test_hidden_rows_are_found_by_their_own_name_alone():
    assert [row.name for row in find_rows(["unet-nano"])] == ["unet-nano"]
    assert all(not row.hidden for names in ([], ["unet"]) for row in find_rows(names))


def test_a_growth_curve_is_measured_in_the_fastest_precision_that_there_is():
    by_name = {name: ROWS[name].measured_in for name in ("growth-batch", "growth-processes", "train-full-32")}
    assert by_name["growth-batch"](["float32", "bfloat16"]) == ("bfloat16",)
    assert by_name["growth-batch"](["float32"]) == ("float32",)
    assert by_name["growth-processes"](["bfloat16", "float32"]) == ("float32",)  # of a model that is painted in it
    assert by_name["growth-processes"](["bfloat16"]) == ("bfloat16",)
    assert by_name["train-full-32"](["bfloat16", "float32"]) == ("bfloat16", "float32")


def test_every_row_has_a_workload_whose_first_contender_is_ours():
    for row in ROWS.values():
        contenders = workload_of(row, "float32").contenders
        assert contenders[0].name == "gobelin"
        assert contenders[0].peer is None
        assert len({one.name for one in contenders}) == len(contenders)
        assert all(one.peer is None or one.peer in PEERS for one in contenders)


def test_contenders_are_known_by_name():
    refuse_unknown_contenders(["diffusers", "openvino"], find_rows(["unet-64"]))
    with pytest.raises(UsageError, match="unknown contender 'openvio': did you mean 'openvino'"):
        refuse_unknown_contenders(["openvio"], find_rows(["unet-64"]))


def test_peers_say_whether_they_are_there():
    with pytest.raises(UsageError, match="unknown peer 'difusers': did you mean 'diffusers'"):
        find_peers(["difusers"])
    missing = Peer(name="other", modules=("no_such_module", "json"), distribution="other", install="pip install other")
    assert missing.line == "other is not installed (no no_such_module): pip install other"
    assert missing.version is None
    there = Peer(name="torch", modules=("torch",), distribution="torch", install="")
    assert there.line.startswith("torch 2.")


def test_rows_without_time_are_left_out_and_said(monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(session, "in_process", lambda task: asked.append(task) or {"contenders": {}})
    content = run_bench(plan("unet-64", "unet-32", budget=1e-9), said.append)
    assert asked == []
    assert content["rows"] == []
    assert "unet-32 in float32 is left out: the budget of 1e-09 minutes is spent" in said
    content = run_bench(plan("unet-64", "unet-32", budget=10), said.append)
    assert [row["row"] for row in content["rows"]] == ["unet-64", "unet-32"]
    assert [round(task.seconds) for task in asked] == [300, 600]


def test_a_row_whose_process_fails_does_not_end_the_others(monkeypatch):
    said = []
    monkeypatch.setattr(session, "in_process", lambda task: {"error": "its process was killed"})
    content = run_bench(plan("unet-64", "unet-32"), said.append)
    assert [row["error"] for row in content["rows"]] == ["its process was killed"] * 2
    assert "unet-64 in float32: its process was killed" in said


def test_a_process_that_finds_no_memory_says_so():
    allowed = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32)); "
    for code in ("import torch; torch.empty(2**40)", "bytearray(2**40)"):
        with pytest.raises(RuntimeError, match=r"^this machine has not enough free memory for it$"):
            run_python(allowed + code, [])
    with pytest.raises(RuntimeError, match="its process ended with 1: ValueError: no"):
        run_python("raise ValueError('no')", [])


def test_growth_is_the_exponent_of_a_power_law():
    assert exponent([1, 2, 4, 8], [3 * value**1.5 for value in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent([1], [3.0]) is None
    assert at_most("threads", [1, 2, 4, 8], 4) == [1, 2, 4]
    assert at_most("side", [16, 32], 1) == [16, 32]


def test_growth_measures_every_size_and_draws_its_curve(tmp_path):
    sizes = {"model": "nano", "side": 16, "batch": 1}
    measured = measure_growth("batch", [1, 2], sizes, "float32", Limits(rounds=2), peers=(), peak_side=64)
    assert [(point["at"], point["samples"]) for point in measured["points"]] == [(1, 1), (2, 2)]
    assert measured["points"][1]["operations"] == 2 * measured["points"][0]["operations"]
    assert set(measured["growth"]) == {"gobelin"}
    row = {"row": "growth-batch", "text": "a very small U-Net", "precision": "float32", **measured}
    for name in ("growth.svg", "growth.png"):
        write_bench_chart({"rows": [row]}, tmp_path / name)
    svg = (tmp_path / "growth.svg").read_text()
    assert "gobelin: ∝ n^" in svg
    assert "ideal: ∝ operations" in svg
    assert "stroke-dasharray" in svg
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > image.height > 100
