"""``gobelin bench``, as a user meets it."""

import json
import subprocess
import sys

import pytest

from gobelin.bench.peers import PEERS, Peer
from gobelin.bench.rows import ROWS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def test_a_small_row_is_measured_printed_and_written(gobelin, files, monkeypatch):
    monkeypatch.setitem(
        PEERS, "openvino", Peer(name="openvino", modules=("no_such",), distribution="x", install="pip install openvino")
    )
    written = [files / name for name in ("bench.json", "bench.md", "bench.svg", "bench.png")]
    status, out, err = gobelin(
        *("bench", "unet-nano", "--precision", "float32", "--rounds", "3", "--threads", "1"),
        *("--peers", "diffusers", "openvino", "--only", "diffusers", "--json", written[0], "--report", written[1]),
        *("--plot", written[2]),
    )
    assert status == 0
    assert "openvino is not installed (no no_such): pip install openvino" in err
    assert "gobelin: unet-nano in float32 (1 of 1)" in err
    assert "unet-nano, float32" in out
    content = json.loads(written[0].read_text())
    assert content["machine"]["cores"] >= 1
    assert content["peers"]["openvino"] is None
    (row,) = content["rows"]
    assert (row["row"], row["precision"], row["threads"], row["rounds"]) == ("unet-nano", "float32", 1, 3)
    assert list(row["contenders"]) == ["gobelin", "diffusers"]
    assert row["spread"] >= 1
    theirs = row["contenders"]["diffusers"]
    assert theirs["verdict"] in ("faster", "level", "slower")
    assert theirs["error"] < 1e-5
    assert theirs["ratio"]["low"] <= theirs["ratio"]["median"] <= theirs["ratio"]["high"]
    assert len(theirs["values"]) == 3
    assert "| gobelin |" in written[1].read_text()
    svg = written[2].read_text()
    assert svg.startswith("<svg")
    assert "diffusers" in svg

    from PIL import Image

    from gobelin.bench.bench_chart import write_bench_chart

    write_bench_chart(content, written[3])
    with Image.open(written[3]) as image:
        assert image.width > image.height > 100


def test_rows_and_programs_are_listed(gobelin):
    status, out, _ = gobelin("bench", "--list")
    assert status == 0
    assert all((name in out) == (not row.hidden) for name, row in ROWS.items())
    assert all(peer in out for peer in PEERS)
    assert "diffusers" not in gobelin("bench", "start-up", "--list", "--peers", "none")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["starup"], "unknown row 'starup': did you mean 'start-up'"),
        (["--peers", "difusers"], "unknown peer 'difusers': did you mean 'diffusers'"),
        (["unet-64", "--only", "openvio"], "unknown contender 'openvio': did you mean 'openvino'"),
        (["--rounds", "0"], "--rounds is 0: give a number above 0"),
        (["--budget", "-1"], "--budget is -1: give a number above 0"),
        (["--precision", "float16"], "float16"),
        (["--plot", "chart.pdf"], "--plot is chart.pdf: give a name that ends in .svg or .png"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(refused, arguments, said):
    status, sentence = refused("bench", *arguments)
    assert status == 2
    assert said in sentence


def test_a_machine_without_bfloat16_measures_the_rest(gobelin, monkeypatch):
    from gobelin.bench import machine, session

    monkeypatch.setattr(machine, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(session, "in_process", lambda task: {"error": f"no time for {task.precision}"})
    status, out, err = gobelin("bench", "unet-nano", "--peers", "none")
    assert status == 0
    assert "this machine does not multiply bfloat16 in hardware: it is left out" in err
    assert "no time for float32" in out
    assert "no time for bfloat16" not in out


def test_the_help_needs_no_pytorch():
    code = "import sys; from gobelin.cli.main import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
