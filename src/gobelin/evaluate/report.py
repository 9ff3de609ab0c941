"""A report of scores: as JSON, as tables, as Markdown. The tables are made of the JSON, so that a file can be shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gobelin.evaluate.benchmark import (
    Painted,
    mean_scores,
    shuffled_captions,
    swapped_attributes,
    task_scores,
)
from gobelin.evaluate.caption_sensitivity import Heard
from gobelin.evaluate.retrieval import Retrieval
from gobelin.evaluate.sanity_checks import Instruments
from gobelin.tokenizer import PARTS

SPLITS: dict[str, str] = {"dev": "held in (dev)", "test": "held in (test)", "heldout": "held out"}

COMPARABLE = (
    "The tasks are GenEval's in kind (arXiv 2310.11513), on procedural scenes. GenEval's own numbers are of another "
    "world, of photographs and their objects, and cannot be compared with these."
)
READING = (
    "Correct: everything asked for is there, in its colour, number and place. Exact: that, and nothing else. Colour "
    "and shape right: each named one is there somewhere. Held out: combinations that training never saw. Intervals are "
    "of 95 %: Wilson's, for as many independent pictures as several of one prompt are worth."
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title, and a note beneath; rows whose number is in ``bold`` sum up others."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    bold: frozenset[int] = frozenset()
    note: str = ""


def report(
    pictures: Sequence[Painted],
    instruments: Instruments,
    found: Retrieval | None,
    heard: Sequence[Heard],
    *,
    model: str,
    world: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, as JSON. ``settings`` say how the pictures were made."""
    scores = task_scores(pictures)
    controls = [*shuffled_captions(pictures), *swapped_attributes(pictures)]
    return {
        "model": model,
        "world": world,
        "settings": settings,
        "pictures": len(pictures),
        "scores": [asdict(score) for score in scores],
        "means": [asdict(mean) for mean in mean_scores(scores)],
        "controls": [asdict(control) for control in controls],
        "retrieval": None if found is None else asdict(found),
        "listening": [asdict(one) for one in heard],
        "instruments": instruments.to_json(),
    }


def tables(content: dict[str, Any]) -> list[Table]:
    """A report as tables, scores first; attribution and editing as their own."""
    if "attribution" in content:
        return _attribution(content["attribution"])
    if "editing" in content:
        return [_editing(content["editing"])]
    return [_scores(content), _controls(content), *_retrieval(content), *_listening(content), _gates(content)]


def markdown(content: dict[str, Any], level: int = 1) -> str:
    """A report as Markdown, its headings from this level on."""
    parts = [f"{'#' * level} Scores of {content['model']}", describe(content)]
    for table in tables(content):
        parts += [f"{'#' * (level + 1)} {table.title}", _markdown(table), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def describe(content: dict[str, Any]) -> str:
    """One line: of which world, and how the pictures were made."""
    if "attribution" in content:
        return f"World {content['world']}, {content['attribution']['captions']:,} captions of the test list."
    if "editing" in content:
        return f"World {content['world']}, {content['editing']['edits']:,} captions of the test list, painted right."
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in content["settings"].items()
    )
    return f"World {content['world']}, {content['pictures']:,} pictures: {settings}."


def _scores(content: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    bold: set[int] = set()
    means = {mean["split"]: mean for mean in content["means"]}
    for split in dict.fromkeys(row["split"] for row in content["scores"]):
        name = _list(split)
        for row in content["scores"]:
            if row["split"] == split:
                shares = [_share(row[key]) for key in ("correct", "colour", "shape", "exact")]
                rows.append((_plain(row["task"]), name, *shares, f"{row['correct']['n']:,}"))
        if mean := means.get(split):
            bold.add(len(rows))
            correct, exact = _share(mean["correct"]), _share(mean["exact"])
            rows.append((f"mean of {mean['tasks']} tasks", name, correct, "", "", exact, f"{mean['correct']['n']:,}"))
    worst = "; ".join(
        f"{_list(split)}, {_plain(mean['worst'])} {_share(mean['worst_correct'])}" for split, mean in means.items()
    )
    return Table(
        title="Faithfulness to the prompt",
        columns=("task", "list", "correct", "colour right", "shape right", "exact scene", "pictures"),
        rows=rows,
        bold=frozenset(bold),
        note=" ".join([*([f"Worst task: {worst}."] if worst else []), READING, COMPARABLE]),
    )


def _controls(content: dict[str, Any]) -> Table:
    rows = [
        (
            row["control"],
            _plain(row["task"]),
            _list(row["split"]),
            _share(row["correct"]),
            f"{row['perfect']:.3f}",
        )
        for row in content["controls"]
    ]
    return Table(
        title="Controls",
        columns=("the same pictures judged with", "task", "list", "correct", "a perfect painter"),
        rows=rows,
        note=(
            "Captions shuffled: by another prompt of the task, which is chance. Attributes swapped: by the prompt with "
            "its colours exchanged, its relation turned round or its number changed; who paints words and not "
            "sentences scores here what it scores above."
        ),
    )


def _retrieval(content: dict[str, Any]) -> list[Table]:
    found = content["retrieval"]
    if found is None:
        return []
    rows = [("all", _share(found["correct"]), f"{found['chance']:.3f}", f"{found['correct']['n']:,} pictures")]
    rows += [(kind, _share(share), "0.500", f"{share['n']:,} captions") for kind, share in found["by_kind"].items()]
    return [
        Table(
            title="Retrieval: a picture's caption against hard negatives",
            columns=("negatives", "caption wins", "chance", "of"),
            rows=rows,
            bold=frozenset([0]),
            note="All: against every hard negative of a picture at once. The others: against one, by what is wrong.",
        )
    ]


def _listening(content: dict[str, Any]) -> list[Table]:
    heard = content["listening"]
    if not heard:
        return []
    ranges = list(dict.fromkeys((one["first_timestep"], one["last_timestep"]) for one in heard))
    cells = {(one["kind"], one["first_timestep"]): f"{one['rise']:+.2%} ± {one['margin']:.2%}" for one in heard}
    numbers = {one["kind"]: one["n"] for one in heard}
    return [
        Table(
            title="Listening: how much worse the U-Net predicts with a wrong caption",
            columns=("what is wrong", *(f"timesteps {first} to {last}" for first, last in ranges), "of"),
            rows=[
                (kind, *(cells[kind, first] for first, _ in ranges), f"{number:,} captions")
                for kind, number in numbers.items()
            ],
            note="The rise of its squared error on scenes of the dev split, same noise: zero for what is not heard.",
        )
    ]


def _gates(content: dict[str, Any]) -> Table:
    instruments = content["instruments"]
    rows = [
        (gate["name"], gate["measured"], gate["required"], "yes" if gate["passed"] else "NO")
        for gate in instruments["gates"]
    ]
    psnr = instruments["psnr"]
    return Table(
        title="Instruments",
        columns=("gate: exact scenes among", "measured", "required", "holds"),
        rows=rows,
        note="" if psnr is None else f"VAE round trips keep {psnr:.1f} dB.",
    )


def _attribution(content: dict[str, Any]) -> list[Table]:
    titles = {"own": "own pictures that the grader found right", "renders": "true scenes, noised"}
    found = [
        _overlaps(f"Attribution: {title} ({content[name]['pictures']:,})", content[name])
        for name, title in titles.items()
    ]
    protocols = list(content["causality"])
    kinds = dict.fromkeys(kind for kinds in content["causality"].values() for kind in kinds)
    causal = Table(
        title="Causality: the change where a word is not looked at, and the word's map",
        columns=("words", *protocols, "of"),
        rows=[
            (kind, *(_mean(content["causality"][p].get(kind)) for p in protocols), f"{_n(content, kind):,} words")
            for kind in kinds
        ],
        note="Pearson's correlation over the pixels.",
    )
    parts = ("text", *PARTS)
    shares = [
        (title, *(f"{content[name]['shares'][part]:.3f}" for part in parts), f"{content[name]['entropy']:.2f}")
        for name, title in titles.items()
        if content[name]["pictures"]
    ]
    where = Table(
        title="Where attention goes",
        columns=("pictures", *parts, "entropy (nats)"),
        rows=shares,
    )
    return [*found, causal, where]


def _editing(content: dict[str, Any]) -> Table:
    return Table(
        title="Editing: one colour word changed",
        columns=("how", "answers to the new caption", "keeps every object's place and shape", "both"),
        rows=[
            (name, *(_share(shares[what]) for what in ("answers", "keeps", "both")))
            for name, shares in content["methods"].items()
        ],
        note=(
            "Of pictures that the grader found right. Kept: every object overlaps by half (intersection over union) "
            "with where it was, has its shape and, if the word was not of it, its colour. Edit: `Pipeline.edit` by its "
            "defaults. Prompt-to-prompt alone: the paper's method. Painted anew: the new caption from the same noise."
        ),
    )


def _overlaps(title: str, content: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    thresholds: list[float] = []
    for protocol, measured in content["protocols"].items():
        cells = {(row["kind"], row["threshold"]): row for row in measured["intersection"]}
        thresholds = sorted({threshold for _, threshold in cells})
        for kind in dict.fromkeys(kind for kind, _ in cells):
            row = [cells[kind, threshold] for threshold in thresholds]
            rows.append((kind, protocol, *map(_mean, row), f"{row[0]['n']:,} words"))
        if argmax := measured["argmax"]["n"]:
            blank = [""] * (len(thresholds) - 2)
            cell = _mean(measured["argmax"])
            rows.append(("nouns, each pixel to one", protocol, "", cell, *blank, f"{argmax:,} words"))
    ceilings = ", ".join(f"1/{scale} {_mean(mean)}" for scale, mean in content["ceilings"].items())
    return Table(
        title=title,
        columns=("words", "protocol", *(f"τ = {threshold}" for threshold in thresholds), "of"),
        rows=rows,
        note=(
            f"Mean intersection over union. For nouns at τ = 0.4 a perfect map reaches, by its resolution: {ceilings}; "
            f"one that lights up everywhere: {_mean(content['whole_image'])}."
        ),
    )


def _n(content: dict[str, Any], kind: str) -> int:
    return max(kinds[kind]["n"] for kinds in content["causality"].values() if kind in kinds)


def _mean(mean: dict[str, Any] | None) -> str:
    if mean is None or mean["value"] is None:
        return "–"
    return f"{mean['value']:.3f}" if mean["margin"] is None else f"{mean['value']:.3f} ± {mean['margin']:.3f}"


def _markdown(table: Table) -> str:
    lines = [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    for number, row in enumerate(table.rows):
        cells = [f"**{cell}**" if number in table.bold and cell else cell for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(share: dict[str, Any]) -> str:
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def _list(split: str) -> str:
    return SPLITS.get(split, split)


def _plain(name: str) -> str:
    return name.replace("_", " ")
