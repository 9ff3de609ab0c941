"""The server under load: pictures a minute at 1, 8 and 64 clients, and two minutes of clients that are slow or leave.

    python scripts/benchmarks/server_load.py throughput --clients 1 8 64 --seconds 60 --json out.json
    python scripts/benchmarks/server_load.py abuse --clients 64 --seconds 120

A server of its own, `gobelin serve`, is started for each measurement, and stopped at the end. *throughput*: every
client submits a picture with the model's own settings, follows its events, fetches it, and begins again; beside it
pictures are painted one after the other, by `gobelin generate`, a process a picture and many in one. *abuse*: of the
clients' jobs a fifth is cancelled, a fifth followed by a reader that goes away, a fifth by one that takes a few bytes a
second, and the rest fetched; lost is a job that was accepted and never ended, or a picture that was done and could not
be fetched. The time is divided into halves, and the server's resident memory is read at rest after each, when all jobs
have ended: what the second half adds is growth. Under load memory moves with the batches that are painted by a quarter
up and down; its mean and peak in the last quarter of the time are printed beside those of the quarter before.
"""

import argparse
import asyncio
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2 as httpx
from paired import print_machine

from gobelin.bench.machine import machine

_PROMPTS = ("a red circle", "a blue ring and a red star", "three green rings", "a yellow star above a purple ring")
_READ_EVERY = 0.25  # s
_REST = 10.0  # s, at the end of which memory at rest is read
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@asynccontextmanager
async def served(*arguments: str) -> AsyncIterator[tuple[str, int]]:
    """Start ``gobelin serve`` at a free port; yields its address and its process's number, and stops it."""
    command = [sys.executable, "-m", "gobelin", "serve", "--port", "0", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    found = re.search(r"http://\S+?(?=[; ]|$)", line)
    assert found is not None, line
    try:
        yield found[0], process.pid
    finally:
        process.terminate()
        await process.wait()
        print(f"server ended with status {process.returncode}")


async def submit(client: httpx.AsyncClient, body: dict[str, Any], counts: Counter[str]) -> str | None:
    """Submit a job; None, after the time that the server says, where its queue is full."""
    answer = await client.post("/v1/jobs", json=body)
    if answer.status_code == 429:
        counts["429"] += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
        return None
    counts[f"submitted {answer.status_code}"] += 1
    return answer.json()["id"] if answer.status_code == 202 else None


async def followed(client: httpx.AsyncClient, job: str) -> str:
    """Follow a job to its end; returns the name of the last event."""
    last = ""
    async with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                last = line.removeprefix("event: ")
    return last


async def paint_for(client: httpx.AsyncClient, seconds: float, number: int, counts: Counter[str]) -> None:
    """Paint one picture after the other."""
    end = time.monotonic() + seconds
    seed = number * 10_000
    while time.monotonic() < end:
        seed += 1
        body = {"kind": "paint", "prompt": _PROMPTS[seed % len(_PROMPTS)], "settings": {"seed": seed}}
        job = await submit(client, body, counts)
        if job is None:
            continue
        state = await followed(client, job)
        counts[state] += 1
        fetched = await client.get(f"/v1/jobs/{job}/images/0")
        counts[f"fetched {fetched.status_code}"] += 1


async def throughput(clients: int, seconds: float) -> dict[str, Any]:
    """Measure pictures a minute of so many clients."""
    counts: Counter[str] = Counter()
    async with served("--queue", "128") as (address, _):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT, limits=limits) as client:
            await client.get("/healthz")
            begun, used = time.monotonic(), await metric(client, "process_cpu_seconds_total")
            await asyncio.gather(*(paint_for(client, seconds, number, counts) for number in range(clients)))
            spent = time.monotonic() - begun
            used = await metric(client, "process_cpu_seconds_total") - used
            batches = batch_sizes((await client.get("/metrics")).text)
    rate, each = counts["done"] / spent * 60, used / max(1, counts["done"])
    print(
        f"{clients:>3} clients: {rate:6.1f} pictures a minute; {each:.2f} s of the processor each; "
        f"{batches:.1f} jobs a batch; {dict(counts)}",
        flush=True,
    )
    return {"clients": clients, "pictures_a_minute": rate, "processor": each, "jobs_a_batch": batches, **counts}


def sequential(count: int) -> dict[str, Any]:
    """Time ``gobelin generate``: a process a picture, and a process with many, one after the other."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = [sys.executable, "-m", "gobelin", "generate", _PROMPTS[0], "--out", folder]
        begun, used = time.monotonic(), children_seconds()
        for seed in range(count):
            subprocess.run([*base, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
        rows["a process a picture"] = count / (time.monotonic() - begun) * 60, (children_seconds() - used) / count
        code = (
            "import time, gobelin\npipe = gobelin.Pipeline.from_pretrained()\npipe('a red circle', seed=0)\n"
            "begun, used = time.monotonic(), time.process_time()\n"
            f"for seed in range({count}): pipe('a red circle', seed=seed)\n"
            f"print({count} / (time.monotonic() - begun) * 60, (time.process_time() - used) / {count})"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        rows["one process, one after the other"] = tuple(map(float, done.stdout.split()))
    for name, (rate, each) in rows.items():
        print(f"{name}: {rate:.1f} pictures a minute; {each:.2f} s of the processor each", flush=True)
    return rows


def children_seconds() -> float:
    """Processor time of the processes that were started and have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def misbehave(client: httpx.AsyncClient, address: str, end: float, number: int, counts: Counter[str]) -> None:
    """Submit jobs until the end; cancel, leave, read slowly or fetch."""
    chance = random.Random(number)
    while time.monotonic() < end:
        settings = {"seed": chance.randrange(2**31), "steps": chance.choice([4, 8]), "count": chance.choice([1, 1, 2])}
        trace = chance.random() < 0.3
        prompt = chance.choice(_PROMPTS)
        body = {"kind": "paint", "prompt": prompt, "settings": settings, "trace": trace, "previews": True}
        job = await submit(client, body, counts)
        if job is None:
            continue
        manner = chance.choice(["cancel", "leave", "slow", "fetch", "fetch"])
        counts[manner] += 1
        if manner == "cancel":
            await asyncio.sleep(chance.random() * 3)
            await client.delete(f"/v1/jobs/{job}")
        elif manner in ("leave", "slow"):
            await read_badly(address, job, manner == "slow", chance)
        await settle(client, job, manner, counts)


async def read_badly(address: str, job: str, slowly: bool, chance: random.Random) -> None:
    """Open the events, and read a few bytes a second of them, or go away without a word."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=64)
    writer.write(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    await writer.drain()
    for _ in range(8 if slowly else chance.randrange(2)):
        await reader.read(16)
        await asyncio.sleep(1)
    writer.transport.abort()


async def settle(client: httpx.AsyncClient, job: str, manner: str, counts: Counter[str]) -> None:
    """Wait for a job's end, and fetch what came of it."""
    for _ in range(600):
        answer = await fetch(client, f"/v1/jobs/{job}", counts)
        if answer.status_code != 200:
            counts[f"lost: {answer.status_code}"] += 1
            return
        view = answer.json()
        if view["state"] in ("done", "failed", "cancelled"):
            counts[view["state"]] += 1
            if view["state"] == "failed":
                counts["lost: failed"] += 1
            for image in view["images"]:
                fetched = await fetch(client, image["url"], counts)
                counts["fetched" if fetched.status_code == 200 else "lost: image"] += 1
            return
        await asyncio.sleep(0.5)
    counts["lost: never ended"] += 1


async def fetch(client: httpx.AsyncClient, url: str, counts: Counter[str]) -> httpx.Response:
    """Fetch once more, as browsers do, where the server closed an idle connection just as the request was written."""
    try:
        return await client.get(url)
    except (httpx.ReadError, httpx.RemoteProtocolError) as error:
        counts[f"again: {type(error).__name__}"] += 1
        return await client.get(url)


async def abuse(clients: int, seconds: float) -> dict[str, Any]:
    """Run clients that misbehave, twice; returns what was counted, with the server's memory."""
    counts: Counter[str] = Counter()
    async with served("--queue", "48") as (address, process):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT, limits=limits) as client:
            halves = []
            for half in range(2):
                end = time.monotonic() + seconds / 2
                numbers = range(half * clients, (half + 1) * clients)
                running = asyncio.gather(*(misbehave(client, address, end, number, counts) for number in numbers))
                memory = []
                while time.monotonic() < end:
                    await asyncio.sleep(_READ_EVERY)
                    memory.append(resident(process))
                await running
                await asyncio.sleep(_REST)
                halves.append((memory, resident(process)))
            text = (await client.get("/metrics")).text
    lost = sum(count for name, count in counts.items() if name.startswith("lost"))
    (_, rested), (memory, rests) = halves
    before, after = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    growth = rests / rested - 1
    print(
        f"{clients} clients, {seconds:.0f} s: lost {lost}; memory at rest {rested:.0f} and {rests:.0f} MiB "
        f"({growth:+.1%}); under load {fmean(before):.0f} and {fmean(after):.0f} on average, at most {max(before):.0f} "
        f"and {max(after):.0f}"
    )
    print(dict(counts), f"{batch_sizes(text):.1f} jobs a batch")
    row = {"clients": clients, "seconds": seconds, "lost": lost, "growth": growth}
    return {**row, "halves": [{"load": load, "rest": rest} for load, rest in halves], **counts}


def resident(process: int) -> float:
    """Read a process's resident memory, in MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """Read one of the server's metrics."""
    text = (await client.get("/metrics")).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))


def batch_sizes(metrics: str) -> float:
    """Compute the mean number of jobs of a batch."""
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("gobelin_batch_jobs_"))
    return float(values["gobelin_batch_jobs_sum"]) / max(1.0, float(values["gobelin_batch_jobs_count"]))


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "abuse"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sequential", type=int, default=10, help="pictures painted without a server, 0 for none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print_machine(machine())
    results: dict[str, Any] = {}
    if options.what == "throughput":
        if options.sequential:
            results["sequential"] = sequential(options.sequential)
        results["clients"] = [asyncio.run(throughput(clients, options.seconds)) for clients in options.clients]
    else:
        results["abuse"] = [asyncio.run(abuse(clients, options.seconds)) for clients in options.clients]
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
