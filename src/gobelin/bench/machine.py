"""The machine that measures: its CPU, precisions, versions, how busy it is, and what memory a process has."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from gobelin.kernels.hardware import has_bfloat16

_BUSY = 0.25  # of the cores
_SPARE = 1e9  # bytes of the free memory that are left to others


def machine() -> dict[str, Any]:
    """Name the machine: its CPU, cores, what it multiplies in hardware, the versions, and how busy it was before."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "bfloat16": has_bfloat16(torch.device("cpu")),
        "amx": any(bool(value) for name, value in capabilities.items() if name.startswith("amx")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def machine_line(of: dict[str, Any]) -> str:
    """Write a machine in one line."""
    bfloat16 = "bfloat16 in hardware" if of["bfloat16"] else "no bfloat16 in hardware"
    return (
        f"{of['cpu']}, {of['cores']} cores, {of['memory_gb']:.0f} GB, {bfloat16}, "
        f"{'with' if of['amx'] else 'no'} AMX, torch {of['torch']}; load before: {of['load_before']:.1f}"
    )


def busy_line(of: dict[str, Any]) -> str:
    """Say that other work on the machine makes the seconds worth little; "" on a quiet one."""
    if of["load_before"] <= _BUSY * (of["cores"] or 1):
        return ""
    return "other work runs here: seconds are too long, ratios spread, and several threads lose most"


def process_memory(process: str = "self") -> dict[str, float]:
    """Read a process's memory in MB (Linux): the most it had, its own, and mapped pages, which the system can drop."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    names = {"peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(found[field].split()[0]) / 1024 for name, field in names.items()}


def limit_memory() -> int:
    """Limit what this process may allocate, so that it fails, and no other process is ended for it; returns bytes."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    limit = int(free - _SPARE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


def _cpu_name() -> str:
    """Name the CPU; a virtual machine's often hides its model, and then the family and model numbers are given."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"
