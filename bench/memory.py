"""Measures the peak memory of one run, in a process that does nothing else."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from likely import noise
from likely.bundle import Graph
from likely.graphs import Device, Session

STATUS = Path("/proc/self/status")


def measure_peak(path: Path, batch: int) -> dict[str, int]:
    """Peak resident memory in MiB, without a run and with a run of that batch size."""
    command = [sys.executable, "-m", "bench.memory", str(path)]
    before, after = (
        int(subprocess.run([*command, str(n)], capture_output=True, check=True).stdout)  # noqa: S603
        for n in (0, batch)
    )
    return {"loaded_mib": before, f"batch_{batch}_mib": after}


def main() -> None:
    """Opens the graph, runs it unless the batch is 0, and prints the peak in MiB."""
    path, batch = Path(sys.argv[1]), int(sys.argv[2])
    spec = Graph.model_validate_json(path.with_suffix(".json").read_text())
    session = Session(path, spec, Device("cpu"))
    if batch:
        shape = spec.inputs[0].array_shape(batch)
        session.run({"gumbel": noise.gumbel(0, range(batch), shape[1:])}, ["x"])
    sys.stdout.write(str(_peak_kib() // 1024))


def _peak_kib() -> int:
    if STATUS.exists():
        # getrusage would include the memory of the parent process at the time of the fork.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
