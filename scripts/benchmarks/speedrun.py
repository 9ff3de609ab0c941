"""Time how long a recipe trains from nothing until what it paints is right: the mean of six tasks, development list.

    python scripts/benchmarks/speedrun.py runs/speedrun
    python scripts/benchmarks/speedrun.py runs/speedrun --preset tiny --unet.half-size-steps 3000 --unet.grounding 0.1

Options that are not its own are those of ``gobelin train``. It trains all stages in two processes of one thread, stops
at every ``--sample-every`` steps of the U-Net, paints the development list (34 prompts a task, 2 images each), and goes
on until the highest goal is reached or the recipe ends. What counts is the time in which training ran, with its starts
and its own samples, and without the scoring. Scores stand in ``speedrun.json`` in the run's folder; a run that was
stopped goes on with the same command. What training says goes into a file beside the folder, ``OUT.log``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gobelin.bench.machine import machine, machine_line
from gobelin.formats.files import read_json, write_json
from gobelin.scenes.prompt_lists import TASKS

GOALS = (0.80, 0.85, 0.90, 0.95)
_PROMPTS, _IMAGES = 34, 2
_PROCESSES = 2
_POLL = 2.0  # s


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the run's folder")
    parser.add_argument("--preset", default="tiny", help="preset of a model of scenes")
    parser.add_argument("--sample-every", type=int, default=1000, help="steps of the U-Net between two scores")
    options, others = parser.parse_known_args()
    recipe = ["--preset", options.preset, "--sample-every", str(options.sample_every), *others]
    found = _read_record(options.out, recipe)
    is_over = False
    while not is_over and max((score["correct"] for score in found["scores"]), default=0) < GOALS[-1]:
        last = found["scores"][-1]["step"] if found["scores"] else 0
        is_over = _train(options.out, found, last // options.sample_every * options.sample_every + options.sample_every)
        step, batch = _newest(options.out)
        step = step if is_over else step // options.sample_every * options.sample_every
        if step > last:
            score = {"step": step, "samples": step * batch, "seconds": found["seconds"], **_score(options.out)}
            found["scores"].append(score)
            write_json(_record(options.out), found)
        _print(found)


def _record(out: Path) -> Path:
    return out / "speedrun.json"


def _log(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def _read_record(out: Path, recipe: Sequence[str]) -> dict[str, Any]:
    """Read what was measured before, or begin; ends the script where the folder holds something else."""
    file = _record(out)
    if not file.exists():
        if (out / "training").exists():
            sys.exit(f"{out} holds a run that was not timed: choose another folder")
        return {"recipe": list(recipe), "machine": machine(), "seconds": 0.0, "scores": []}
    found = read_json(file)
    if found["recipe"] != list(recipe):
        sys.exit(f"{out} holds a run of {' '.join(found['recipe'])}: give the same options, or choose another folder")
    return found


def _train(out: Path, found: dict[str, Any], until: int) -> bool:
    """Train until the model of step ``until`` is written, counting seconds; returns whether training has ended."""
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(_PROCESSES)]
    train += ["-m", "gobelin", "train", "--out", str(out)]
    train += ["--resume"] if (out / "training" / "config.json").exists() else found["recipe"]
    before, begun = found["seconds"], time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _log(out).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(train, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    is_stopped = False
    while process.poll() is None:
        time.sleep(_POLL)
        found["seconds"] = before + time.monotonic() - begun
        if out.is_dir():
            write_json(_record(out), found)
        if not is_stopped and _newest(out)[0] > until:  # the model is written between two lines of the log
            is_stopped = True
            process.send_signal(signal.SIGTERM)
    if process.returncode != 0 and not is_stopped:
        sys.exit(f"training ended with status {process.returncode}, {_log(out)} says why: go on with the same command")
    return process.returncode == 0


def _newest(out: Path) -> tuple[int, int]:
    """Read the newest step of the U-Net from the log, 0 before it, and how many samples a step has."""
    file = out / "training" / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    config = out / "training" / "config.json"
    batch = read_json(config)["unet"]["optim"]["batch_size"] if config.exists() else 0
    return (last["step"] if last.get("stage") == "unet" else 0), batch


def _score(out: Path) -> dict[str, float]:
    """Score the model as it stands; returns the mean of the six tasks with its interval."""
    scores = out / "dev.json"
    evaluate = [sys.executable, "-m", "gobelin", "evaluate", "scenes", str(out), "--splits", "dev", "--tasks", *TASKS]
    evaluate += ["--limit", str(_PROMPTS), "--count", str(_IMAGES), "--json", str(scores)]
    subprocess.run(evaluate, check=True, stdout=subprocess.DEVNULL)
    (mean,) = read_json(scores)["means"]
    return {"correct": mean["correct"]["value"], "low": mean["correct"]["low"], "high": mean["correct"]["high"]}


def _print(found: dict[str, Any]) -> None:
    """Print the scores, and when each goal was reached, as Markdown."""
    print(f"\n{' '.join(found['recipe'])}\n{machine_line(found['machine'])}\n")
    print("| samples | hours | mean |\n|---|---|---|")
    for score in found["scores"]:
        interval = f"{score['correct']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"
        print(f"| {score['samples']:,} | {score['seconds'] / 3600:.2f} | {interval} |")
    print(f"\n| {' | '.join(f'{goal:.2f}' for goal in GOALS)} |\n|{'---|' * len(GOALS)}")
    first = [next((one["seconds"] for one in found["scores"] if one["correct"] >= goal), None) for goal in GOALS]
    print(f"| {' | '.join('–' if each is None else f'{each / 3600:.2f} hours' for each in first)} |\n", flush=True)


if __name__ == "__main__":
    main()
