"""``gobelin evaluate``: its measurements, the options that each has, and the files that it writes."""

import json
import shutil

import pytest
from PIL import Image

MEASUREMENTS = (
    *("scenes", "images", "prompts", "attribution", "editing", "patching", "erasure", "correspondence", "presence"),
    *("emoji", "fidelity"),
)


def is_one_sentence(text):
    return text.count("\n") == 1 and "Traceback" not in text and text.startswith("gobelin: ")


def test_help_lists_the_measurements(gobelin):
    status, out, _ = gobelin("evaluate", "--help")
    assert status == 0
    assert all(f"  {name} " in out for name in MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_help_with_examples_and_options_of_its_own(gobelin, name):
    status, out, _ = gobelin("evaluate", name, "--help")
    assert status == 0
    assert f"gobelin evaluate {name}" in out.split("xamples:")[1]
    listed = out.rpartition("-h, --help")[2]  # the options, below the examples
    options = ("json", "report", "sheet", "splits", "sampler", "dtype", "out")
    assert {option for option in options if f"--{option} " in listed} == {
        "scenes": {"json", "report", "sheet", "splits", "sampler", "dtype"},
        "images": {"json", "report", "sheet"},
        "prompts": {"splits", "out"},
        "attribution": {"json", "report", "dtype"},
        "editing": {"json", "report", "dtype"},
        "patching": {"json", "report", "dtype"},
        "erasure": {"json", "report", "dtype"},
        "correspondence": {"json", "report", "dtype"},
        "presence": {"json", "report", "dtype"},
        "emoji": {"json", "report", "sampler", "dtype", "sheet"},
        "fidelity": {"json", "report", "sampler", "dtype", "out"},
    }[name]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["sceens"], 2, "unknown measurement 'sceens': did you mean 'scenes'?"),
        (["editting", "--limit", "2"], 2, "unknown measurement 'editting': did you mean 'editing'?"),
        (
            ["zebra"],
            2,
            "unknown measurement 'zebra': the choices are scenes, images, prompts, attribution, editing, patching, "
            "erasure, correspondence, heads, presence, emoji, fidelity",
        ),
        (["--limit", "2"], 2, "unknown measurement '--limit'"),
        (["attribution", "--limit", "1"], 2, "limit is 1: give a number from 2"),
        (["correspondence", "--limit", "1"], 2, "limit is 1: give a number from 2"),
        (["correspondence", "--limit", "2", "--layers", "attn9"], 2, "'attn9' matches no layer of this U-Net"),
        (["correspondence", "--limit", "2", "--timestep", "1000"], 2, "timestep is 1000"),
        (["presence", "--split", "train"], 2, "--split is 'train': give one of"),
        (["editing", "--limit", "1001"], 2, "limit is 1001: give a number from 2 to 1000"),
        (["scenes", "--sheet", "sheet"], 2, "--sheet is sheet: give a name that ends in .png or .jpg"),
        (
            ["images", "nowhere", "--sheet", "sheet.gif"],
            2,
            "--sheet is sheet.gif: give a name that ends in .png or .jpg",
        ),
        (["scenes", "nowhere"], 1, "no model at nowhere"),
        (["editing", "nowhere"], 1, "no model at nowhere"),
        (["scenes", "--tasks", "juggling"], 2, "unknown task 'juggling': the choices are single_object"),
        (["attribution", "--world", "mars"], 2, "unknown world 'mars'"),
        (["attribution", "--world", "nano", "--dtype", "float16", "nowhere"], 1, "no model at nowhere"),
        (["prompts", "--world", "mars", "--out", "x"], 2, "unknown world 'mars'"),
        (["images", "nowhere", "--world", "mars"], 2, "unknown world 'mars'"),
        (["scenes", "--splits", "train"], 2, "unknown split 'train': the choices are dev, test, heldout"),
        (["scenes", "--limit", "0"], 2, "limit is 0: give a number from 1 to 1000"),
        (["prompts", "--count", "0", "--out", "x"], 2, "count is 0"),
        (["scenes", "--seed", "-1"], 2, "the seed is -1"),
        (["prompts", "--seed", "-1", "--out", "x"], 2, "the seed is -1"),
        (["scenes", "--steps", "0"], 2, "steps is 0: give a whole number from 1 to 1000"),
        (
            ["images", "nowhere"],
            1,
            "nowhere/metadata.jsonl cannot be read: expected the list that gobelin evaluate prompts",
        ),
    ],
)
def test_bad_input_gets_one_sentence(gobelin, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = gobelin("evaluate", *arguments)
    assert is_one_sentence(err), err
    assert message in err
    assert got == status
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_options_of_other_measurements_are_refused(gobelin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["attribution", "--count", "2"],
        ["images", "x", "--steps", "3"],
        ["editing", "--sheet", "x.png"],
    ):
        status, _, err = gobelin("evaluate", *arguments)
        assert status == 2
        assert next(option for option in arguments if option.startswith("--")) in err


def test_scenes_reports_scores_with_intervals(gobelin, trained, tmp_path):
    files = {name: tmp_path / name for name in ("scores.json", "scores.md", "sheet.png")}
    options = ("--limit", 3, "--count", 2, "--steps", 1, "--tasks", "colours", "position")
    written = ("--json", files["scores.json"], "--report", files["scores.md"], "--sheet", files["sheet.png"])
    status, out, err = gobelin("evaluate", "scenes", trained, *options, *written)
    assert status == 0, err
    report = json.loads(files["scores.json"].read_text())
    assert [(row["task"], row["split"]) for row in report["scores"]] == [
        (task, split) for split in ("dev", "heldout") for task in ("colours", "position")
    ]
    for row in [*report["scores"], *report["controls"]]:
        assert row["correct"]["low"] <= row["correct"]["value"] <= row["correct"]["high"]
        assert row["correct"]["n"] == 6
    settings = report["settings"]
    assert (report["world"], report["images"], settings["steps"]) == ("nano", 24, 1)
    assert (settings["prompts_a_task"], settings["images_a_prompt"], settings["dtype"]) == (3, 2, "float32")
    assert report["retrieval"]["correct"]["n"] == 30
    assert report["sanity_checks"]["renders"]["two"]["value"] == 1
    assert "position" in out
    assert "| colours | held out |" in files["scores.md"].read_text()
    with Image.open(files["sheet.png"]) as sheet:
        assert sheet.width > 500


def test_correspondence_finds_points_again(gobelin, trained, tmp_path):
    file, report = tmp_path / "found.json", tmp_path / "found.md"
    options = ("--world", "core", "--limit", 2, "--layers", "up_blocks.*", "--timestep", 0, "--json", file)
    status, out, err = gobelin("evaluate", "correspondence", trained, *options, "--report", report)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert found["timestep"] == 0
    assert {name.split(".")[0] for name in found["layers"]} == {"up_blocks"}
    assert all(shares["features"]["object"]["n"] == 16 for shares in found["found"].values())
    assert "raw pixels" in report.read_text()
    assert "in the right object" in out


def test_presence_tells_scores_apart(gobelin, trained, tmp_path):
    file, report = tmp_path / "told.json", tmp_path / "told.md"
    options = ("--world", "nano", "--limit", 3, "--split", "dev", "--json", file, "--report", report)
    status, out, err = gobelin("evaluate", "presence", trained, *options)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert found["images"] == 3
    for auc in found["told"].values():
        assert 0 <= auc["low"] <= auc["value"] <= auc["high"] <= 1
    assert "denoising" in report.read_text()
    assert "AUC" in out


def test_attribution_compares_words_with_objects(gobelin, trained, tmp_path):
    file, report = tmp_path / "attribution.json", tmp_path / "attribution.md"
    options = ("--world", "nano", "--limit", 3, "--json", file, "--report", report)
    status, out, err = gobelin("evaluate", "attribution", trained, *options)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert (found["world"], found["captions"]) == ("nano", 3)
    assert found["renders"]["images"] == 3
    assert 0 < found["renders"]["whole_image"]["value"] < 0.3
    assert found["renders"]["protocols"].keys() == {"DAAM", "sharp, unweighted", "sharp", "looked at"}
    assert "true scenes, noised" in out
    assert "a perfect map reaches" in report.read_text()


def test_editing_compares_three_methods(gobelin, trained, tmp_path):
    file, report = tmp_path / "editing.json", tmp_path / "editing.md"
    options = ("--world", "nano", "--limit", 2, "--json", file, "--report", report)
    status, out, err = gobelin("evaluate", "editing", trained, *options)  # it paints all green: a green square
    assert status == 0, err
    found = json.loads(file.read_text())
    assert found["kinds"].keys() == {"colour", "shape", "number", "relation"}
    measured = found["kinds"]["colour"]
    assert measured["methods"].keys() == {"edit", "prompt-to-prompt alone", "painted anew"}
    assert 1 <= measured["edits"] <= 2
    for score in measured["methods"].values():
        assert {score[outcome]["n"] for outcome in score} == {measured["edits"]}
        assert 0 <= score["outside"]["value"] <= 1
    assert "one colour changed" in out
    assert "painted anew" in report.read_text()


def test_images_of_another_program_are_scored(gobelin, tmp_path):
    folder = tmp_path / "elsewhere"
    options = ("--world", "nano", "--limit", 2, "--count", 1)
    status, out, err = gobelin("evaluate", "prompts", "--out", folder, *options)
    assert (status, out) == (0, f"16 images to generate: {folder}\n"), err
    status, _, err = gobelin("evaluate", "images", folder)
    assert (status, is_one_sentence(err)) == (1, True)
    assert "dev-single_object-000-0.png cannot be scored: no such file" in err
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        Image.new("RGB", (128, 128), "grey").save(folder / json.loads(line)["file_name"])
    files = {name: tmp_path / name for name in ("scores.json", "scores.md", "sheet.jpg")}
    written = ("--json", files["scores.json"], "--report", files["scores.md"], "--sheet", files["sheet.jpg"])
    status, out, err = gobelin("evaluate", "images", folder, *written)
    assert status == 0
    assert err == "gobelin: 16 of 16 images are not 64×64 and were resized\n"
    report = json.loads(files["scores.json"].read_text())
    assert all(row["correct"]["value"] == 0 for row in report["scores"])
    assert (report["world"], report["model"], report["retrieval"]) == ("nano", "elsewhere", None)
    assert report["sanity_checks"]["round_trips"] is None
    assert "# Scores of elsewhere" in files["scores.md"].read_text()
    with Image.open(files["sheet.jpg"]) as sheet:
        assert sheet.format == "JPEG"


def test_scenes_need_a_world_and_can_do_without_an_image_encoder(gobelin, trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    said = json.loads((model / "gobelin.json").read_text())
    (model / "gobelin.json").write_text(json.dumps({name: said[name] for name in said if name != "world"}))
    status, _, err = gobelin("evaluate", "scenes", model)
    assert status == 2
    assert is_one_sentence(err)
    assert "the model model does not name the world of scenes" in err
    assert "say --world NAME, one of core, nano" in err
    shutil.rmtree(model / "image_encoder")
    options = ("--limit", 1, "--count", 1, "--steps", 1, "--tasks", "colours", "--json", tmp_path / "scores.json")
    status, _, err = gobelin("evaluate", "scenes", model, "--world", "nano", *options)
    assert status == 0
    assert err == f"gobelin: no retrieval scores, as there is no {model / 'image_encoder'}\n"
    assert json.loads((tmp_path / "scores.json").read_text())["retrieval"] is None
