"""The warm-up of a model version: opens and checks its graphs, and measures how to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from likely.batching import tuning
from likely.batching.batches import Runner
from likely.batching.portions import Portions
from likely.batching.tuning import Best
from likely.bundle import Bundle, Manifest, Role
from likely.errors import BundleError
from likely.graphs import CPU, Array, agrees
from likely.ranking import RANKED

LARGEST = 64  # rows of a batch on CPUs: larger ones gain nothing, and other requests wait
LARGEST_ON_CARD = 256
MAX_CORES_PER_RUN = 8  # cores of one run: graphs of this size are not faster on more
MULTI_CORE_ROLES = (Role.DENSITY,)  # roles whose runs may be worth several cores
TUNING_SECONDS = 0.06  # seconds of measuring for each graph
DRAWING_SECONDS = 0.25  # the same for a graph that draws pixel by pixel
# On a card, a drawing takes perhaps a second, of one picture or of many.
DRAWING_SECONDS_ON_CARD = 4.0


@dataclass(frozen=True, slots=True)
class Warm:
    """What a warm-up found.

    Attributes:
        runners: the runner of each graph of the bundle.
        lanes: number of runs at once.
        best: how each graph runs best.
    """

    runners: Mapping[Role, Runner]
    lanes: int
    best: Mapping[Role, Best]


def warm_up(
    bundle: Bundle,
    open_graph: Callable[[Role, int], Runner],
    wrap_runner: Callable[[Role, Runner], Runner],
    *,
    lanes: int,
    cores: int,
    max_batch: int,
    filled: bool = False,
) -> Warm:
    """Opens a bundle's graphs, replays its golden outputs, and measures what is not given.

    Args:
        bundle: a verified bundle.
        open_graph: opens the graph of a role for runs on the given number of cores.
        wrap_runner: wraps the runner of a role, to add what is computed from the graph's outputs.
        lanes: number of runs at once; 0 to find the best number.
        cores: the largest number of lanes that is tried, and the most cores of one run.
        max_batch: rows of one run at most; 0 to find the best number.
        filled: whether every run is padded to `max_batch` rows, which then must not be 0.

    Raises:
        BundleError: a graph cannot be opened, has no golden outputs, or does not reproduce them.
    """
    roles = list(bundle.manifest.graphs)
    widest = 1 if max_batch else min(cores, MAX_CORES_PER_RUN)
    several = [role for role in roles if role in MULTI_CORE_ROLES and widest > 1]
    with ThreadPoolExecutor(cores) as pool:
        bare = list(
            pool.map(
                open_graph,
                roles + several,
                [1] * len(roles) + [widest] * len(several),
            )
        )
    wrapped = [
        wrap_runner(role, runner) for role, runner in zip(roles + several, bare, strict=True)
    ]
    if filled:
        wrapped = [Portions(runner, max_batch, fill=True) for runner in wrapped]
    runners = dict(zip(roles, wrapped, strict=False))
    wide = dict(zip(several, wrapped[len(roles) :], strict=True))
    golden = bundle.golden()
    for role, runner in (*runners.items(), *wide.items()):
        _check_golden(bundle.manifest, role, runner, golden)
    if max_batch:
        # A padded run costs the same for few rows as for many: do not spread rows over lanes.
        best = dict.fromkeys(runners, Best(max_batch, min_rows=max_batch if filled else 1))
    else:
        best = {role: _tune_graph(role, runner, golden) for role, runner in runners.items()}
        for role, runner in zip(roles, bare, strict=False):
            if best[role].rows_per_run:
                runners[role] = wrap_runner(role, Portions(runner, best[role].rows_per_run))
        for role, runner in wide.items():
            if _is_worth_all_cores(role, runner, runners[role], best[role], golden):
                best[role] = replace(best[role], wide=runner)
    if not lanes and cores > 1:
        # Any graph shows how many runs at once suit this machine; most requests use the density.
        role = Role.DENSITY if Role.DENSITY in runners else next(iter(runners))
        lanes = _tune_lanes(role, runners[role], golden, best[role].rows, cores)
    return Warm(runners, lanes or cores, best)


def _check_golden(
    manifest: Manifest, role: Role, runner: Runner, golden: Mapping[str, Array]
) -> None:
    graph = manifest.graphs[role]
    outputs = [spec.name for spec in graph.outputs]
    names = [*(spec.name for spec in graph.inputs), *outputs]
    if missing := [name for name in names if f"{role}/{name}" not in golden]:
        raise BundleError(f"the golden arrays have no {role}/{missing[0]}", "golden")
    feeds = {spec.name: golden[f"{role}/{spec.name}"] for spec in graph.inputs}
    for name, got in zip(outputs, runner.run(feeds, outputs), strict=True):
        if not agrees(got, golden[f"{role}/{name}"]):
            raise BundleError(
                f"bundle {manifest.name}@{manifest.version} does not give its "
                f"golden {name} of the {role} graph on this machine",
                "golden",
            )


def _tune_graph(role: Role, runner: Runner, golden: Mapping[str, Array]) -> Best:
    """Measures how a graph runs best on this machine, with its golden inputs."""
    sample, outputs = _sample(role, runner, golden)
    on_card = runner.providers[0] != CPU
    most = LARGEST_ON_CARD if on_card else LARGEST
    # Drawing gains most from large batches and takes longest: try fewer sizes.
    step = 4 if role in (Role.SAMPLE, Role.GENERATE) else 2
    seconds, growth = TUNING_SECONDS, None
    if role == Role.SAMPLE:
        # Pixel by pixel, a run has a high fixed cost: four times the rows take twice the time.
        seconds, growth = (DRAWING_SECONDS_ON_CARD, 1.0) if on_card else (DRAWING_SECONDS, 2.0)
    return tuning.find_best_batch(
        runner, sample, outputs, most=most, step=step, seconds=seconds, growth=growth
    )


def _is_worth_all_cores(
    role: Role, wide: Runner, narrow: Runner, best: Best, golden: Mapping[str, Array]
) -> bool:
    """Whether one row runs faster on all cores, and takes too long for the event loop."""
    sample, outputs = _sample(role, narrow, golden)
    return not best.loop_rows and tuning.is_faster_on_all_cores(
        wide, narrow, sample, outputs, seconds=2 * TUNING_SECONDS
    )


def _tune_lanes(
    role: Role, runner: Runner, golden: Mapping[str, Array], rows: int, cores: int
) -> int:
    """Measures how many runs at once are best on this machine."""
    sample, outputs = _sample(role, runner, golden)
    return tuning.find_lane_count(
        runner, sample, outputs, rows=rows, most=cores, seconds=2 * TUNING_SECONDS
    )


def _sample(
    role: Role, runner: Runner, golden: Mapping[str, Array]
) -> tuple[dict[str, Array], list[str]]:
    """A graph's golden inputs, and the names of the outputs that requests ask for."""
    sample = {spec.name: golden[f"{role}/{spec.name}"] for spec in runner.spec.inputs}
    if role is Role.DENSITY:
        return sample, [RANKED]
    return sample, [spec.name for spec in runner.spec.outputs]
