"""The charts of a training run's report: which numbers of its files are drawn against which."""

import math
from collections.abc import Mapping, Sequence

from gobelin.training.caption_validation import Against, CaptionLosses, caption_gain, noise_level
from gobelin.training.line_chart import ChartLine, line_chart
from gobelin.training.run_files import Line, RunFiles, column

Chart = tuple[str, str, str]
"""A title, what it adds in pale, and the SVG element."""

_MOST_DOTS = 500  # of a line: more only make the page heavy
_SMOOTH = 0.05  # of the points: those that a running mean is over
_WIDE_RANGE = 8  # times the least value, from which an axis is logarithmic
# Of a line of the metrics, beside the loss and its terms:
_NOT_LOSSES = ("step", "lr", "samples_per_s", "loss", "grad_norm", "data_wait", "memory_mb")


def validation_charts(run: RunFiles) -> list[Chart]:
    """Draw for each bin of timesteps, from high noise to low, the losses with each caption and the gains."""
    lines = {split: _losses(run.validation.get(split, [])) for split in ("held_out", "training")}
    if not (held_out := lines["held_out"]):
        return []
    bins = held_out[-1][1].bins
    same = {split: [(step, one) for step, one in found if one.bins == bins] for split, found in lines.items()}
    charts = []
    for place in reversed(range(len(bins))):
        level = noise_level(bins, place)
        level, more = level[0].upper() + level[1 : level.index(" (")], level[level.index("(") + 1 : -1]
        charts += [
            (f"{level}: loss", more, _loss_chart(same, place, level)),
            (f"{level}: gain by the caption", more, _gain_chart(same, place, level)),
        ]
    return [chart for chart in charts if chart[2]]


def loss_charts(run: RunFiles, names: Mapping[str, str]) -> list[Chart]:
    """Draw each stage's loss, logged values as dots and their running mean, and its learning rate beside it."""
    charts = []
    for stage, lines in run.metrics.items():
        title, rate = f"{names.get(stage, stage)}: loss", f"{names.get(stage, stage)}: learning rate"
        steps, rates = _thin(*column(lines, "lr"))
        rates = line_chart([ChartLine(name="", x=steps, y=rates)], f"{rate} by step", with_zero=True)
        charts += [*_one(title, "", _stream(*column(lines, "loss"), title)), *_one(rate, "", rates)]
    return charts


def term_charts(run: RunFiles, names: Mapping[str, str]) -> list[Chart]:
    """Draw every other number of a stage's lines, the loss's terms and its gradient's norm."""
    charts = []
    for stage, lines in run.metrics.items():
        terms = dict.fromkeys(key for line in lines for key in line if key not in ("stage", *_NOT_LOSSES))
        for term in [*terms, "grad_norm"]:
            title = f"{names.get(stage, stage)}: {'norm of the gradient' if term == 'grad_norm' else term}"
            charts += _one(title, "", _stream(*column(lines, term), title))
    return charts


def speed_charts(run: RunFiles, names: Mapping[str, str]) -> list[Chart]:
    """Draw images a second, the share of time spent waiting for data, and memory: running means, all stages in one."""
    charts = []
    titles = {"samples_per_s": "Images a second", "data_wait": "Waiting for data", "memory_mb": "Memory, MB"}
    for key, title in titles.items():
        lines = []
        for style, (stage, found) in enumerate(run.metrics.items()):
            steps, values = column(found, key)
            steps, values = _thin(steps, running_mean(values))
            lines.append(ChartLine(name=names.get(stage, stage), x=steps, y=values, style=style % 4))
        unit = "%" if key == "data_wait" else ""
        charts += _one(title, "", line_chart(lines, f"{title} by step", unit=unit, with_zero=True))
    return charts


def attention_charts(run: RunFiles) -> list[Chart]:
    """Draw the mean entropy of the words' maps, and the shares of attention that go to BOS and padding."""
    entropy, bos, padding = (
        ChartLine(name=name, x=steps, y=values, style=style, points="marked")
        for name, key, style in (("", "entropy", 0), ("BOS", "bos_share", 0), ("padding", "padding_share", 1))
        for steps, values in [column(run.attention, key)]
    )
    said = "Shares of attention to BOS and padding by step"
    return [
        *_one("Entropy of the words' maps", "bits", line_chart([entropy], "Entropy of the words' maps by step")),
        *_one("Attention that goes to no word", "", line_chart([bos, padding], said, unit="%", with_zero=True)),
    ]


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, a twentieth of all of them, fewer at the ends."""
    reach = round(len(values) * _SMOOTH / 2)
    parts = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _losses(lines: Sequence[Line]) -> list[tuple[int, CaptionLosses]]:
    return [(line["step"], CaptionLosses.from_record(line)) for line in lines]


def _loss_chart(found: Mapping[str, list[tuple[int, CaptionLosses]]], place: int, level: str) -> str:
    lines = []
    for style, (split, kind, name) in enumerate(
        (
            ("held_out", "right", "right"),
            ("held_out", "wrong", "wrong"),
            ("held_out", "empty", "none"),
            ("training", "right", "training"),
        )
    ):
        values = [getattr(losses, kind)[place] for _, losses in found[split]]
        lines.append(ChartLine(name=name, x=[step for step, _ in found[split]], y=values, style=style, points="marked"))
    return line_chart(lines, f"{level}: validation loss with the right caption, a wrong one and none, by step")


def _gain_chart(found: Mapping[str, list[tuple[int, CaptionLosses]]], place: int, level: str) -> str:
    def line(name: str, split: str, against: Against, style: int, banded: bool) -> ChartLine:
        gains = [caption_gain(losses, against)[place] for _, losses in found[split]]
        return ChartLine(
            name=name,
            x=[step for step, _ in found[split]],
            y=[gain.value for gain in gains],
            style=style,
            points="marked",
            low=[gain.low for gain in gains] if banded else None,
            high=[gain.high for gain in gains] if banded else None,
        )

    lines = [
        line("vs none", "held_out", "empty", 0, banded=True),
        line("vs wrong", "held_out", "wrong", 1, banded=True),
        line("training", "training", "empty", 3, banded=False),
    ]
    return line_chart(lines, f"{level}: share by which the right caption lowers the loss", unit="%", with_zero=True)


def _stream(steps: Sequence[int], values: Sequence[float], description: str) -> str:
    """Draw a long row of noisy values: faint dots, and their running mean."""
    wide = bool(values) and min(values) > 0 and max(values) > _WIDE_RANGE * min(values)
    dots, line = _thin(steps, values), _thin(steps, running_mean(values))
    return line_chart(
        [ChartLine(name="", x=dots[0], y=dots[1], points="alone"), ChartLine(name="", x=line[0], y=line[1])],
        f"{description} by step",
        scale="log" if wide else "linear",
    )


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Keep every n-th value and the last where there are very many."""
    stride = max(1, math.ceil(len(values) / _MOST_DOTS))
    kept = sorted({*range(0, len(values), stride), len(values) - 1}) if values else []
    return [steps[place] for place in kept], [values[place] for place in kept]


def _one(title: str, more: str, chart: str) -> list[Chart]:
    return [(title, more, chart)] if chart else []
