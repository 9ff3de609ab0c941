"""The report of a training run: one HTML file that needs no network, made from the files in the run's folder alone.

So it can be made at any time, while a run trains or after it was killed, and again. What is missing or damaged is left
out, and the page says so.
"""

import base64
import html
import io
import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from PIL import Image

from gobelin.errors import GobelinError
from gobelin.formats.files import write_text
from gobelin.images import data_url, open_image
from gobelin.training.caption_verdict import describe_caption_losses
from gobelin.training.run_charts import (
    attention_charts,
    loss_charts,
    speed_charts,
    term_charts,
    validation_charts,
)
from gobelin.training.run_files import RunFiles, column, inside, number, read_run
from gobelin.training.run_settings import changed_settings, is_finished, planned_steps, stage_setting

REPORT_FILE = "report.html"
_STAGES = {"text_encoder": "Text encoder", "vae": "VAE", "unet": "U-Net"}
_SHEETS = {
    "unet": ("Painted from prompts", "The same prompts and noise at every step, from the averaged weights."),
    "words": ("Word maps", "Which word painted which pixel: where the U-Net's cross-attention looks at each word."),
    "vae": ("Reconstructions", "Images above, and what the VAE makes of them below."),
}
_MOST_SHEETS, _MOST_PAIRS = 12, 24  # in a film, and of nearest images, so that the page stays a few megabytes
_WIDEST = 1280  # pixels of an image
_PHOTO = 400_000  # pixels from which a JPEG is kept, a fifth of the size; smaller images stay exact


def write_run_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run to its ``training/report.html``, or to ``out``; returns the file.

    Raises :class:`TrainingError` for a folder that holds no training run.
    """
    file = out or run_folder / "training" / REPORT_FILE
    write_text(file, run_report(run_folder))
    return file


def run_report(run_folder: Path) -> str:
    """Make the report's HTML; raises as :func:`write_run_report`."""
    run = read_run(run_folder)
    name = run_folder.resolve().name
    # Sheets come before the notes, to which they add the names of those that cannot be opened.
    middle = [_heard(run), _samples(run), _losses(run), _attention(run), _nearest(run), _speed(run), _settings(run)]
    body = [_head(run, name), *middle, _notes(run), _going_on(run, run_folder)]
    page = files("gobelin.training").joinpath("run_report.html").read_text(encoding="utf-8")
    return Template(page).substitute(title=html.escape(name), body="\n".join(filter(None, body)))


def _head(run: RunFiles, name: str) -> str:
    verdict = describe_caption_losses(run.validation.get("held_out", []), run.validation.get("training", []))
    parts = [f'<p class="kind">Training report</p><h1>{html.escape(name)}</h1>']
    parts.append(f'<p class="verdict">{html.escape(verdict)}</p>')
    if isinstance(description := run.data.get("description"), str):
        count = number(run.data.get("count"))
        pairs = f" ({count:,.0f} captioned images)" if count is not None else ""
        parts.append(f"<p>Trained on {html.escape(description)}{pairs}{_start(run)}.</p>")
    rows = [_stage_row(run, stage) for stage in run.metrics]
    columns = ("stage", "steps", "batch", "highest rate", "last loss", "images/s", "memory")
    parts.append(_table(columns, rows, "numbers") if rows else _absent("No step has been logged yet."))
    return "".join(parts)


def _start(run: RunFiles) -> str:
    """Name the model that the run began with; nothing for one from scratch."""
    if "method" not in run.config:
        return ""
    model = run.config.get("model")
    return f", from {html.escape(model)}" if isinstance(model, str) else ", from the model that comes with Gobelin"


def _stage_row(run: RunFiles, stage: str) -> tuple[str, ...]:
    """Sum up a stage: its steps of those planned, its batch and rate, and its last loss, speed and memory."""
    lines = run.metrics[stage]
    done, planned = lines[-1]["step"], planned_steps(run.config, stage)
    steps = f"{done:,}" if planned is None or planned == done else f"{done:,} of {planned:,}"
    batch = stage_setting(run.config, stage, "batch_size")
    rates, losses, speeds, memory = (column(lines, name)[1] for name in ("lr", "loss", "samples_per_s", "memory_mb"))
    return (
        _STAGES.get(stage, stage),
        steps,
        f"{batch:g}" if batch is not None else "–",
        f"{max(rates):.3g}" if rates else "–",
        f"{losses[-1]:.4g}" if losses else "–",
        f"{sum(speeds) / len(speeds):,.0f}" if speeds else "–",
        f"{max(memory):,.0f} MB" if memory else "–",
    )


def _heard(run: RunFiles) -> str:
    title = "Does the U-Net hear the caption?"
    charts = validation_charts(run)
    if not charts:
        return _section(
            title, _absent("Not measured: this needs images that are held out of training, 160 in all or more.")
        )
    hint = (
        "The loss on images that were held out of training, with the right caption, with another image's (wrong) and "
        "with none, always under the same noise; and the share by which the right one lowers it, with its 95 % "
        "interval. A U-Net that hears gains on both. The line “training” is the right caption, and its gain on none, "
        "on images that it was trained on: where it runs away, and the held-out loss rises, it memorises."
    )
    return _section(title, f'<p class="hint">{hint}</p>{_charts(charts)}')


def _samples(run: RunFiles) -> str:
    known = [
        *(stage for stage in _SHEETS if stage in run.sheets),
        *(each for each in run.sheets if each not in _SHEETS),
    ]
    films = [film for stage in known if (film := _film(run, stage, run.sheets[stage]))]
    return _section("Samples, from the first step to the last", "".join(films) or _absent("There are no sheets yet."))


def _film(run: RunFiles, stage: str, found: Sequence[tuple[int, Path]]) -> str:
    """Show sheets of one kind, at most twelve: the first, the last, and some spread evenly between them."""
    title, hint = _SHEETS.get(stage, (stage, ""))
    last = len(found) - 1
    chosen = sorted({round(last * place / (_MOST_SHEETS - 1)) for place in range(_MOST_SHEETS)})
    figures = []
    for step, file in (found[place] for place in chosen):
        if picture := _picture(run, file, f"{title} at step {step:,}"):
            figures.append(
                f'<figure data-step="Step {step:,}">{picture}<figcaption>Step {step:,}</figcaption></figure>'
            )
    left_out = f" {len(chosen)} of {len(found)} sheets are shown." if len(found) > len(chosen) else ""
    head = f'<h3>{html.escape(title)}</h3><p class="hint">{hint}{left_out}</p>'
    return f'{head}<div class="film">{"".join(figures)}</div>' if figures else ""


def _losses(run: RunFiles) -> str:
    charts = loss_charts(run, _STAGES)
    if not charts:
        return _section("Loss", _absent("No loss has been logged yet."))
    hint = "Dots are means of logged steps; the line is their running mean."
    parts = [f'<p class="hint">{hint}</p>', _charts(charts)]
    if terms := term_charts(run, _STAGES):
        parts.append(f"<details><summary>Terms of the losses, and gradients</summary>{_charts(terms)}</details>")
    return _section("Loss", "".join(parts))


def _attention(run: RunFiles) -> str:
    if not (charts := attention_charts(run)):
        return _section("Cross-attention", _absent("No attention has been measured yet."))
    hint = (
        "A word that finds its place has a map of low entropy: it looks at few patches. What goes to the beginning of "
        "the prompt (BOS) and to padding goes to no word."
    )
    return _section("Cross-attention", f'<p class="hint">{hint}</p>{_charts(charts)}')


def _nearest(run: RunFiles) -> str:
    """Show samples beside the training images that they resemble most; nothing where that was not measured."""
    figures = []
    for one in run.nearest[:_MOST_PAIRS]:
        places = inside(run.folder, one.get("sample")), inside(run.folder, one.get("nearest"))
        pictures = [
            _picture(run, file, name) if file else ""
            for file, name in zip(places, ("A sample", "Its nearest training image"), strict=True)
        ]
        distance, median = number(one.get("distance")), number(one.get("median_distance"))
        if not all(pictures) or distance is None:
            run.notes.append("A pair of nearest.json is damaged, or its images are not in the run's folder.")
            continue
        usual = f"; the median over training images is {median:.3g}" if median is not None else ""
        caption = f"<figcaption>Distance {distance:.3g}{usual}.</figcaption>"
        figures.append(f"<figure><div>{''.join(pictures)}</div>{caption}</figure>")
    if not figures:
        return ""
    hint = "Samples, left, and the training image nearest to each: a distance far below the median is a copy."
    return _section("Nearest training images", f'<p class="hint">{hint}</p><div class="pairs">{"".join(figures)}</div>')


def _speed(run: RunFiles) -> str:
    charts = speed_charts(run, _STAGES)
    return _section("Speed and memory", _charts(charts) if charts else _absent("No speed has been logged yet."))


def _settings(run: RunFiles) -> str:
    if not run.config:
        return _section("Settings", _absent("The configuration cannot be shown."))
    preset, changed = changed_settings(run.config)
    if changed:
        said = f"<p>What differs from the preset <code>{html.escape(preset)}</code>, the nearest:</p>"
        said += _table(("setting", "this run", "preset"), changed, "settings")
    else:
        said = f"<p>They are those of the preset <code>{html.escape(preset)}</code>.</p>"
    whole = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return _section("Settings", f"{said}<details><summary>All settings</summary><pre>{whole}</pre></details>")


def _notes(run: RunFiles) -> str:
    notes = list(dict.fromkeys(run.notes))
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return _section("Left out of this page", f"<ul>{items}</ul>") if notes else ""


def _going_on(run: RunFiles, run_folder: Path) -> str:
    """Say what to do next: generate where there is a model or an adapter, resume where steps remain."""
    folder, prompt = shlex.quote(str(run_folder)), 'gobelin generate "YOUR PROMPT"'
    commands = []
    if (run_folder / "model_index.json").exists():
        commands.append(f"{prompt} --model {folder}")
    elif run.config.get("method") == "adapter" and (adapters := sorted(run_folder.glob("*.safetensors"))):
        model = run.config.get("model")
        base = f" --model {shlex.quote(model)}" if isinstance(model, str) else ""
        commands.append(f"{prompt}{base} --lora {shlex.quote(str(adapters[-1]))}")
    if not is_finished(run.config, {stage: lines[-1]["step"] for stage, lines in run.metrics.items()}):
        commands.append(f"gobelin train --out {folder} --resume")
    commands.append(f"gobelin report {folder}")
    said = "<p>The last makes this page again from the files in the folder.</p>"
    return _section("How to go on", f"<pre>{html.escape(chr(10).join(commands))}</pre>{said}")


def _picture(run: RunFiles, file: Path, description: str) -> str:
    """Show an image, reduced where it is large; "" and a note where it cannot be opened."""
    try:
        image = open_image(file)
    except (GobelinError, OSError):
        run.notes.append(f"{file.name} cannot be opened as an image.")
        return ""
    image.thumbnail((_WIDEST, 4 * _WIDEST), Image.Resampling.LANCZOS)
    kind = ' class="small"' if image.width <= 256 else ""  # enlarged: pixels are to be seen as they are
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{kind} src="{_url(image)}" {size} alt="{html.escape(description)}">'


def _url(image: Image.Image) -> str:
    if image.width * image.height < _PHOTO:
        return data_url(image)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _absent(sentence: str) -> str:
    return f'<p class="absent">{sentence}</p>'


def _charts(charts: Sequence[tuple[str, str, str]]) -> str:
    """Lay out charts: (title, what it adds in pale, SVG)."""
    figures = [
        f"<figure><figcaption>{html.escape(title)} <span>{html.escape(more)}</span></figcaption>{chart}</figure>"
        for title, more, chart in charts
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'
