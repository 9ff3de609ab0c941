"""Data of a training run: the wait for it, what caching saves, what two processes save, and memory by number of pairs.

    python scripts/benchmarks/training_data.py wait cache processes --json runs/benchmarks/training_data.json
    python scripts/benchmarks/training_data.py memory --json runs/benchmarks/training_data.json --scratch /tmp/pairs

``wait``: runs of ``gobelin train`` on a made folder of PNG and JPEG images, and the share of time that its
metrics.jsonl says it waited for data. ``cache``: steps of the shipped model's U-Net on cached latents and text
embeddings, beside steps that encode images, captions or both; the loops take turns. ``processes``: one process with two
threads and two with one thread each (torchrun), the same batch, runs in turns. ``memory``: the memory of whole short
runs on made tars of many pairs, each a process of its own, and of opening an index of a million. Pairs of 100,000 take
3 GB in ``--scratch`` with what is cached of them; they are removed unless ``--keep`` is given.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from pair_index import make as make_index
from paired import print_machine, print_table, ratios, take_turns, write_results, written
from PIL import Image
from torch import Tensor, nn

from gobelin.bench.machine import machine, process_memory
from gobelin.bench.training_loops import Finished, Loop, MadeStage, TakingTurns, make_batch, quiet_run
from gobelin.clip import TextEncoder
from gobelin.data.buckets import Preprocessing
from gobelin.data.cached_dataset import CachedDataset
from gobelin.data.encoded import LatentCache, TextCache, weights_hash
from gobelin.data.image_folder import ImageFolderDataset
from gobelin.data.pair_index import PairIndex
from gobelin.pipeline import Pipeline
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.training import distributed, find_preset
from gobelin.training.losses import UNetBatch, UNetLoss
from gobelin.training.precision import autocast
from gobelin.training.stages import UNetStage, encode_texts
from gobelin.training.trainer import fit
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE

PARTS = ("wait", "cache", "processes", "memory")
_PAIRS_OF_A_TAR = 10_000
_WORDS = ("red", "blue", "green", "white", "black", "small", "large", "round", "circle", "square", "house", "tree")
_SIDE = 64
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    """Measure the parts that are asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all without")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scratch", type=Path, help="where data is made; a temporary folder without it")
    parser.add_argument("--keep", action="store_true", help="keep what is made in --scratch")
    parser.add_argument("--threads", type=int, default=2, help="of wait and cache")
    parser.add_argument("--presets", nargs="+", choices=("nano", "tiny"), default=["nano", "tiny"])
    parser.add_argument("--images", type=int, default=2000, help="of wait and cache")
    parser.add_argument("--steps", type=int, default=200, help="of each stage of wait")
    parser.add_argument("--rounds", type=int, default=10, help="of cache")
    parser.add_argument("--runs", type=int, default=5, help="of processes, each way")
    parser.add_argument("--run-steps", type=int, default=12, help="of processes, that are timed")
    parser.add_argument("--batch-size", type=int, default=64, help="of cache and processes")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000], help="of memory")
    parser.add_argument("--index", type=int, default=1_000_000, help="pairs of the made index; 0 makes none")
    parser.add_argument("--memory-steps", type=int, default=50, help="of each stage of memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _WORKERS[options.worker](options)
        return
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown: {', '.join(unknown)}; the choices are {', '.join(PARTS)}")
    found = machine()
    print_machine(found)
    with tempfile.TemporaryDirectory(prefix="training-data-") as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for part in options.parts or PARTS:
            write_results(options.json, {"machine": found, part: _MEASURES[part](options, scratch)})


# wait


def measure_wait(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Train each preset for a few steps on a folder, and read what it says of its waiting."""
    data = make_folder(scratch / f"folder-{options.images}", options.images)
    measured = []
    for preset in options.presets:
        out = scratch / f"wait-{preset}"
        shutil.rmtree(out, ignore_errors=True)
        stages = [part for stage in ("text", "vae", "unet") for part in (f"--{stage}.optim.steps", str(options.steps))]
        command = [sys.executable, "-m", "gobelin", "train", "--preset", preset, "--data.path", str(data)]
        command += ["--out", str(out), *stages, "--samples", "0", "--data.validation", "0", "--sample-every", "1000000"]
        start = perf_counter()
        subprocess.run(
            command, env=_environment(options.threads), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        whole = perf_counter() - start
        lines = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
        for stage in dict.fromkeys(line["stage"] for line in lines):
            of_stage = [line for line in lines if line["stage"] == stage]
            # the first line has the first step, which is slower than all others
            later = of_stage[1:]
            if later:
                counts = np.diff([line["step"] for line in of_stage])
                measured.append(
                    {
                        "preset": preset,
                        "stage": stage,
                        "threads": options.threads,
                        "images": options.images,
                        "steps": options.steps,
                        "data_wait": float(np.average([line["data_wait"] for line in later], weights=counts)),
                        "samples_per_s": float(np.average([line["samples_per_s"] for line in later], weights=counts)),
                        "whole_run_s": whole,
                    }
                )
    print_table(
        f"Waiting for data: {options.images:,} PNG and JPEG images, {options.threads} thread(s)",
        ("preset", "stage", "samples/s", "share of time waiting"),
        [(m["preset"], m["stage"], f"{m['samples_per_s']:.0f}", f"{m['data_wait']:.2%}") for m in measured],
    )
    return measured


def make_folder(folder: Path, count: int) -> Path:
    """Make a folder of PNG and JPEG images of several sizes, with captions; one that is there is kept."""
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        width, height = generator.integers(_SIDE, 5 * _SIDE, 2).tolist()
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        name = f"{number:06d}.{'png' if number % 2 else 'jpg'}"
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": _caption(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _caption(number: int) -> str:
    words = [_WORDS[number // len(_WORDS) ** power % len(_WORDS)] for power in range(3)]
    return f"a {' '.join(words)} in picture {number}"


# cache


@dataclass(frozen=True, kw_only=True, eq=False)
class ToEncode:
    """A batch of which images, captions or both are still to be encoded."""

    cached: UNetBatch
    images: Tensor | None
    token_ids: Tensor | None

    def to(self, device: torch.device) -> "ToEncode":
        """Stay on the CPU."""
        return self


class EncodingLoss(nn.Module):
    """gobelin's loss, after encoding in the step itself what is not cached, as most training loops do."""

    def __init__(self, loss: UNetLoss, vae: VAE, text_encoder: TextEncoder):
        super().__init__()
        self.loss = loss
        self.vae = vae.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)

    def forward(self, batch: ToEncode) -> dict[str, Tensor]:
        """Encode, and compute the loss."""
        latents, texts = batch.cached.latents, batch.cached.texts
        with torch.no_grad():
            if batch.images is not None:
                posterior = self.vae.encode(batch.images)
                std = torch.exp(0.5 * posterior.logvar)
                latents = (posterior.mean + std * torch.randn_like(std)).float() * self.vae.config.scaling_factor
            if batch.token_ids is not None:
                texts = self.text_encoder(batch.token_ids).float()
        return self.loss(replace(batch.cached, latents=latents, texts=texts))


def measure_cache(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure in a process that begins with the number of threads."""
    measured = _worker("cache", options, scratch, threads=options.threads)
    seconds = measured["seconds"]
    rows = []
    for name, one in seconds.items():
        ratio = written(measured["ratios"][name]) if name in measured["ratios"] else "1"
        rows.append((name, f"{np.median(one):.3f}", f"{1 / np.median(one):.2f}", ratio))
    print_table(
        f"Cached and encoded in the step: tiny, batch {options.batch_size}, {options.threads} thread(s), "
        f"{measured['precision']}",
        ("latents and texts", "seconds a step", "steps/s", "time, cached = 1 (quartiles)"),
        rows,
    )
    reading = measured["reading_s"].items()
    print_table("Making a batch, one thread", ("from", "ms"), [(name, f"{1000 * one:.1f}") for name, one in reading])
    return measured


def cache_worker(options: argparse.Namespace) -> None:
    """Let steps on cached and on uncached data take turns; prints JSON."""
    scratch = options.scratch
    folder = make_folder(scratch / f"folder-{options.images}", options.images)
    pipeline = Pipeline.from_pretrained(None, "cpu")
    vae, text_encoder, tokenizer = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    optim = replace(find_preset("tiny").unet.optim, optimizer="adamw", batch_size=options.batch_size, steps=10**9)
    config = replace(find_preset("tiny").unet, optim=optim)
    source = ImageFolderDataset(folder, _SIDE)
    dataset = CachedDataset(source, scratch / "cache", workers=options.threads)

    @torch.no_grad()
    def encode(images: Tensor) -> Any:
        with autocast(vae.device, optim.precision):
            return vae.encode(images)

    latents = LatentCache(dataset, scratch / "cache", weights_hash(vae))
    start = perf_counter()
    latents.fill(encode)
    latents_s = perf_counter() - start
    texts = TextCache(scratch / "cache", weights_hash(text_encoder))
    start = perf_counter()
    texts.fill(dataset, lambda captions: encode_texts(text_encoder, tokenizer, captions))
    texts_s = perf_counter() - start

    def cached_stage() -> UNetStage:
        torch.manual_seed(0)
        loss = UNetLoss(UNet(UNetConfig.tiny()), None, NoiseSchedule(ScheduleConfig.zero_terminal_snr()))
        scale = vae.config.scaling_factor
        return UNetStage(loss, dataset, latents.read, scale, texts.read, config, 0, lambda *_: None)

    class Uncached(MadeStage):
        """The cached stage's batches, with the images and captions that are still to be encoded."""

        def __init__(self, images: bool, captions: bool):
            self.inner = cached_stage()
            module = EncodingLoss(self.inner.module, vae, text_encoder)
            super().__init__(module=module, optim=optim, batches=())
            self._images, self._captions = images, captions

        def batch(self, step: int, rows: slice) -> ToEncode:
            indices = self.inner.order.indices(step)[rows].tolist()
            return ToEncode(
                cached=self.inner.batch(step, rows),
                images=dataset.images(indices) if self._images else None,
                token_ids=tokenizer([dataset.captions(one)[0] for one in indices]) if self._captions else None,
            )

    stages: dict[str, Callable[[], Any]] = {
        "both cached": cached_stage,
        "both cached, again": cached_stage,
        "captions encoded": lambda: Uncached(False, True),
        "images encoded": lambda: Uncached(True, False),
        "both encoded": lambda: Uncached(True, True),
    }
    stage, indices = cached_stage(), list(range(options.batch_size))
    reading = {
        "cached latents and text embeddings": _seconds(lambda: stage.batch(0, slice(None))),
        "cached pixels": _seconds(lambda: dataset.images(indices)),
        "PNG and JPEG files": _seconds(lambda: [source[index] for index in indices]),
    }
    loops = [
        Loop(name, _fit_in_turns(make, scratch / "runs" / str(at))) for at, (name, make) in enumerate(stages.items())
    ]
    seconds = take_turns(loops, options.rounds, steps=3, warm_up=3)
    base = seconds["both cached"]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "ratios": {name: ratios(one, base) for name, one in seconds.items() if name != "both cached"},
                "reading_s": reading,
                "filling_s_per_image": {"latents": latents_s / len(dataset), "texts": texts_s / len(dataset)},
                "batch_size": options.batch_size,
                "threads": options.threads,
                "precision": "bfloat16" if machine()["bfloat16"] else "float32",
            }
        )
    )


def _fit_in_turns(make: Callable[[], Any], folder: Path) -> Callable[[Callable[[], None]], object]:
    def run(turn: Callable[[], None]) -> None:
        stage = make()
        stage.module = TakingTurns(stage.module, turn)
        fit(stage, quiet_run(folder))

    return run


def _seconds(call: Callable[[], object], repeats: int = 9) -> float:
    spent = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        spent.append(perf_counter() - start)
    return float(np.median(spent))


# processes


def measure_processes(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run one process with two threads, two with one thread each, and the first once more, in turns."""
    ways = {
        "one process, two threads": (1, 2),
        "two processes, one thread each": (2, 1),
        "one process, two threads, again": (1, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.runs):
        for name, (processes, threads) in ways.items() if number % 2 == 0 else reversed(ways.items()):
            seconds[name].append(_worker("process", options, scratch, threads, processes)["seconds_a_step"])
    first = next(iter(ways))
    measured = {
        "seconds": seconds,
        "ratios": {name: ratios(one, seconds[first]) for name, one in seconds.items() if name != first},
        "batch_size": options.batch_size,
        "steps": options.run_steps,
    }
    rows = []
    for name, one in seconds.items():
        ratio = written(measured["ratios"][name]) if name in measured["ratios"] else "1"
        rows.append((name, f"{np.median(one):.3f}", f"{options.batch_size / np.median(one):.0f}", ratio))
    print_table(
        f"Processes: tiny's U-Net, AdamW, batch {options.batch_size} over all, {options.runs} runs each of "
        f"{options.run_steps} steps",
        ("", "seconds a step", "samples/s", "time, one process = 1 (quartiles)"),
        rows,
    )
    return measured


def process_worker(options: argparse.Namespace) -> None:
    """Take steps on made batches with ``fit``, alone or as one of several; the first process prints JSON."""
    warm_up, times = 3, list[float]()
    device = torch.device("cpu")
    with distributed.init_process_group(device):
        torch.manual_seed(0)
        optim = replace(find_preset("tiny").unet.optim, optimizer="adamw", batch_size=options.batch_size, steps=10**9)
        loss = UNetLoss(UNet(UNetConfig.tiny()), None, NoiseSchedule(ScheduleConfig.zero_terminal_snr()))
        share = options.batch_size // distributed.world_size()

        def turn() -> None:
            times.append(perf_counter())
            if len(times) > warm_up + options.run_steps:
                raise Finished

        batches = [make_batch(UNetConfig.tiny(), share, 32) for _ in range(4)]
        stage = MadeStage(module=TakingTurns(loss, turn), optim=optim, batches=batches)
        with suppress(Finished):
            fit(cast(Any, stage), quiet_run(options.scratch / f"process-{os.getpid()}"))
        if distributed.is_main_process():
            print(json.dumps({"seconds_a_step": (times[-1] - times[warm_up]) / options.run_steps}), flush=True)
        distributed.barrier()


# memory


def measure_memory(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train on made tars of many pairs, and open a made index, each in a process of its own."""
    measured: dict[str, Any] = {"runs": [], "index": None}
    for pairs in options.pairs:
        folder = scratch / f"pairs-{pairs}"
        start = perf_counter()
        make_tars(folder / "tars", pairs)
        made_s = perf_counter() - start
        one = _worker("memory", options, folder, threads=options.threads)
        cache = {kind: _folder_bytes(folder / "cache", kind) for kind in ("pixels", "latents", "texts", "index")}
        measured["runs"].append({"pairs": pairs, "made_s": made_s, "bytes": cache, **one})
        if not options.keep:
            shutil.rmtree(folder)
    if options.index:
        options.memory_pairs = scratch / f"index-{options.index}"
        make_index(options.memory_pairs, options.index)
        measured["index"] = {"pairs": options.index, **_worker("index", options, options.memory_pairs, threads=1)}
        if not options.keep:
            shutil.rmtree(options.memory_pairs)
    print_table(
        f"Memory of a whole nano run, {options.memory_steps} steps a stage, images of {_SIDE}²",
        ("pairs", "seconds", "peak MB", "own MB at the end", "mapped MB at the end", "cache on disk MB"),
        [
            (
                f"{one['pairs']:,}",
                f"{one['seconds']:.0f}",
                *(f"{one['memory'][name]:,.0f}" for name in ("peak", "own", "mapped")),
                f"{sum(one['bytes'].values()) / 1e6:,.0f}",
            )
            for one in measured["runs"]
        ],
    )
    if measured["index"]:
        one = measured["index"]
        print(
            f"\nAn index of {one['pairs']:,} pairs: {one['bytes'] / one['pairs']:.0f} bytes a pair, opened in "
            f"{one['seconds']:.2f} s, with {one['grown']['own']:+.0f} MB of its own and "
            f"{one['grown']['mapped']:+.0f} MB mapped"
        )
    return measured


def make_tars(folder: Path, pairs: int) -> None:
    """Make tars of PNG images, each with its own number in its pixels, and its own caption; those there are kept."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    generator = np.random.default_rng(0)
    grounds = [
        np.array(Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((_SIDE, _SIDE)))
        for _ in range(64)
    ]
    for start in range(0, pairs, _PAIRS_OF_A_TAR):
        with tarfile.open(unfinished / f"{start // _PAIRS_OF_A_TAR:05d}.tar", "w") as tar:
            for number in range(start, min(start + _PAIRS_OF_A_TAR, pairs)):
                pixels = grounds[number % len(grounds)].copy()
                digest = hashlib.sha256(number.to_bytes(8, "little")).digest()
                pixels.reshape(-1)[: len(digest)] = np.frombuffer(digest, np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
                for suffix, content in (("png", buffer.getvalue()), ("txt", _caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    unfinished.rename(folder)


def memory_worker(options: argparse.Namespace) -> None:
    """Train nano for a few steps a stage; prints JSON."""
    from gobelin import train

    config = find_preset("nano")
    stages = {
        name: replace(getattr(config, name), optim=replace(getattr(config, name).optim, steps=options.memory_steps))
        for name in ("text", "vae", "unet")
    }
    data = replace(config.data, path=str(options.scratch / "tars"), cache=str(options.scratch / "cache"))
    config = replace(config, data=data, samples=0, sample_every=10**6, **stages)
    shutil.rmtree(options.scratch / "run", ignore_errors=True)
    start, before = perf_counter(), process_memory()
    train(config, options.scratch / "run")
    seconds = perf_counter() - start
    lines = [
        json.loads(line) for line in (options.scratch / "run" / "training" / "metrics.jsonl").read_text().splitlines()
    ]
    stages_peak = {line["stage"]: line["memory_mb"] for line in lines if "memory_mb" in line}
    print(
        json.dumps(
            {"seconds": seconds, "before": before, "memory": process_memory(), "peak_after_stage_mb": stages_peak}
        )
    )


def index_worker(options: argparse.Namespace) -> None:
    """Open an index, assign its images to a size, and read pairs from all over; prints JSON."""
    before, start = process_memory(), perf_counter()
    index = PairIndex(options.scratch)
    Preprocessing(size=_SIDE).assign(index.widths, index.heights)
    seconds = perf_counter() - start
    for row in np.random.default_rng(0).integers(0, len(index), 1000).tolist():
        index[row]
    after = process_memory()
    size = sum(file.stat().st_size for file in options.scratch.rglob("*") if file.is_file())
    grown = {name: after[name] - before[name] for name in after}
    print(json.dumps({"seconds": seconds, "grown": grown, "bytes": size}))


def _folder_bytes(cache: Path, kind: str) -> int:
    return sum(file.stat().st_size for folder in cache.glob(f"{kind}*") for file in folder.rglob("*") if file.is_file())


# workers


def _worker(name: str, options: argparse.Namespace, scratch: Path, threads: int, processes: int = 1) -> dict[str, Any]:
    """Measure in processes of their own; returns what the first printed last."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, "--worker", name, "--scratch", str(scratch)]
    for option in ("threads", "images", "rounds", "run_steps", "batch_size", "memory_steps"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, env=_environment(threads), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **dict.fromkeys(_THREADS, str(threads))}


_MEASURES = {
    "wait": measure_wait,
    "cache": measure_cache,
    "processes": measure_processes,
    "memory": measure_memory,
}
_WORKERS = {"cache": cache_worker, "process": process_worker, "memory": memory_worker, "index": index_worker}


if __name__ == "__main__":
    main()
