"""``gobelin page``, as a user meets it; the page itself is tested in ``tests/static_page``."""

import pytest

from gobelin.static_page import RuntimeFiles


@pytest.fixture
def written(monkeypatch):
    """What was asked for: (model's name, folder, runtime); nothing is exported."""
    calls = []

    def write(model, folder, runtime):
        calls.append((model.name, folder, runtime))
        return 28_940_000

    monkeypatch.setattr("gobelin.static_page.write_page", write)
    monkeypatch.setattr("gobelin.static_page.find_runtime", lambda given: RuntimeFiles(script=b"", program=bytes(1)))
    return calls


def test_the_page_of_the_model_that_ships_is_written(gobelin, written, tmp_path):
    status, out, err = gobelin("page", "--out", tmp_path / "page")
    assert (status, err) == (0, "")
    assert out == f"{tmp_path / 'page'} (28.9 MB): python -m http.server --directory {tmp_path / 'page'}\n"
    ((name, folder, runtime),) = written
    assert (name, folder, runtime.program) == ("tiny", tmp_path / "page", bytes(1))


def test_that_of_a_model_of_ones_own(gobelin, written, trained, tmp_path):
    assert gobelin("page", "--model", trained, "--out", tmp_path / "page")[0] == 0
    assert written[0][0] != "tiny"


def test_a_folder_that_is_not_empty_is_refused(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert refused("page", "--out", tmp_path) == (2, f"{tmp_path} exists already: choose another name")
    assert refused("page", "--out", tmp_path / "mine.txt")[0] == 2


def test_what_is_missing_is_said(refused, tmp_path):
    assert refused("page") == (2, "--out is missing: give PATH (folder to write, which is not there yet, or empty)")
    status, sentence = refused("page", "--out", tmp_path / "page", "--runtime", tmp_path)
    assert status == 2
    assert "does not hold onnxruntime-web@" in sentence
    assert not (tmp_path / "page").exists()


def test_onnx_that_is_not_installed_is_said(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("gobelin.checkpoint.onnx_files.find_spec", lambda name: None)
    assert "pip install 'gobelin[onnx]'" in refused("page", "--out", tmp_path / "page")[1]
