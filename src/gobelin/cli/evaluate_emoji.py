"""The work of ``gobelin evaluate emoji``: captions painted, and judged by networks that saw true pictures alone."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gobelin.cli.evaluate_options import EvaluateEmoji
from gobelin.cli.open_and_paint import open_pipeline
from gobelin.cli.report_files import progress_bar, publish, require_sheet_suffix, write_sheet
from gobelin.data.emoji_set import EmojiSet, read_emoji
from gobelin.errors import UsageError
from gobelin.evaluate.emoji_judge import EmojiJudge, JudgeConfig, open_judge
from gobelin.evaluate.emoji_scores import PARTS, choose_captions, emoji_report, measure_emoji
from gobelin.evaluate.image_sets import paint_captions, painted_size
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.settings import Settings

_JUDGE = "judge.safetensors"
_SETTINGS = ("sampler", "steps", "guidance")
_SHOWN, _COLUMNS, _SIDE = 100, 10, 96


def evaluate_emoji(options: EvaluateEmoji) -> None:
    """Train the judge unless it is there, paint, and print and write what came of it."""
    require_sheet_suffix(options.sheet)
    if options.limit < 1:
        raise UsageError(f"limit is {options.limit}: give 1 or more")
    given = {key: getattr(options, key) for key in _SETTINGS}
    Settings(seed=options.seed, **given)
    pictures = read_emoji(options.folder)
    pipeline = open_pipeline(options)
    judge = _open_judge(options.folder, pictures)
    size = pictures.images.shape[1]
    if painted_size(pipeline) != size:
        raise UsageError(f"{pipeline.name} paints {painted_size(pipeline)} pixels, and the judge reads {size}")
    chosen = choose_captions(pictures, options.limit, options.seed)
    painted = {}
    with progress_bar("painting", sum(map(len, chosen.values()))) as advance:
        for split, rows in chosen.items():
            captions = [pictures.captions[row] for row in rows.tolist()]
            images = paint_captions(pipeline, captions, options.seed, given, advance=advance)
            painted[split] = rows, np.stack(list(images))
    recommended = {key: getattr(pipeline.recommended, key) for key in _SETTINGS}
    settings: dict[str, Any] = {
        **{key: recommended[key] if value is None else value for key, value in given.items()},
        "seed": options.seed,
        "dtype": options.dtype,
    }
    content = measure_emoji(pipeline.name, pictures, judge, pipeline.vae, painted, settings).to_json()
    if options.sheet is not None:
        title = f"{pipeline.name}: captions as they come, those of others framed in red"
        write_sheet(options.sheet, _sheet(pictures, judge, painted, title))
    publish(options, content, emoji_report(content))


def _open_judge(folder: Path, pictures: EmojiSet) -> EmojiJudge:
    """Read the judge that is kept with the pictures, or train it, which takes minutes."""
    config = JudgeConfig()
    with progress_bar("training the judge", config.steps) as advance:
        return open_judge(pictures, folder / _JUDGE, config, advance)


def _sheet(
    pictures: EmojiSet, judge: EmojiJudge, painted: dict[str, tuple[np.ndarray, np.ndarray]], title: str
) -> Image.Image:
    """Lay out images of each split, spread evenly over its captions, with what the judge took the wrong ones for."""
    lines = []
    for split, (rows, images) in painted.items():
        places = np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).round().astype(int)
        seen = judge.recognise(images[places])[0].argmax(dim=1).tolist()
        tiles = []
        for row, image, found in zip(rows[places].tolist(), images[places], seen, strict=True):
            right = found == pictures.concept[row]
            note = "" if right else f"taken for {pictures.concept_names[found]}"
            tiles.append(
                Tile(image=Image.fromarray(image), caption=pictures.captions[row], note=note, failed=not right)
            )
        lines.append(TileRow(heading=PARTS[split], tiles=tiles))
    return captioned_grid(lines, columns=_COLUMNS, side=_SIDE, title=title, gap=14, text=12)
