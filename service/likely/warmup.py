"""The warm-up of a model version: graphs opened, proven on this machine, tried for the best way."""

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

LARGEST = 64  # rows of a batch: beyond, nothing is gained on cores, and others wait
LARGEST_ON_CARD = 256
WIDEST = 8  # cores of one run: graphs of this size are not sooner done on more
LONG = (Role.DENSITY,)  # whose runs may be worth several cores
TUNING = 0.06  # seconds for each graph
DRAWING = 0.25  # for one that draws pixel by pixel
DRAWING_ON_CARD = 4.0  # a card takes as long for one picture as for many, a second may be


@dataclass(frozen=True, slots=True)
class Warm:
    """What a warm-up found.

    Attributes:
        runners: one for each graph of the bundle.
        lanes: runs at once.
        best: how each graph runs best.
    """

    runners: Mapping[Role, Runner]
    lanes: int
    best: Mapping[Role, Best]


def warm_up(
    bundle: Bundle,
    opened: Callable[[Role, int], Runner],
    completed: Callable[[Role, Runner], Runner],
    *,
    lanes: int,
    cores: int,
    max_batch: int,
    filled: bool = False,
) -> Warm:
    """Opens a bundle's graphs, replays its golden outputs, then measures what is not given.

    Args:
        bundle: verified.
        opened: opens the graph of a role, for runs on so many cores.
        completed: adds what is computed from the outputs of a role's graph.
        lanes: runs at once; 0 to find how many are best.
        cores: the most runs at once, where that is to be found, and the most that one run takes.
        max_batch: rows of one run; 0 to find what is best.
        filled: whether every run is filled up to `max_batch` rows, which is then not 0.

    Raises:
        BundleError: a graph does not open or give its golden outputs, or there are none of it.
    """
    roles = list(bundle.manifest.graphs)
    widest = 1 if max_batch else min(cores, WIDEST)
    several = [role for role in roles if role in LONG and widest > 1]
    with ThreadPoolExecutor(cores) as pool:
        bare = list(pool.map(opened, roles + several, [1] * len(roles) + [widest] * len(several)))
    found = [completed(role, runner) for role, runner in zip(roles + several, bare, strict=True)]
    if filled:
        found = [Portions(runner, max_batch, fill=True) for runner in found]
    runners = dict(zip(roles, found, strict=False))
    wide = dict(zip(several, found[len(roles) :], strict=True))
    golden = bundle.golden()
    for role, runner in (*runners.items(), *wide.items()):
        _prove(bundle.manifest, role, runner, golden)
    if max_batch:
        # Filled up, few rows cost a run as much as many: they are not spread over the lanes.
        best = dict.fromkeys(runners, Best(max_batch, grain=max_batch if filled else 1))
    else:
        best = {role: _best(role, runner, golden) for role, runner in runners.items()}
        for role, runner in zip(roles, bare, strict=False):
            if best[role].run:
                runners[role] = completed(role, Portions(runner, best[role].run))
        for role, runner in wide.items():
            if _is_worth_all_cores(role, runner, runners[role], best[role], golden):
                best[role] = replace(best[role], wide=runner)
    if not lanes and cores > 1:
        # Any graph tells how many runs at once this machine takes; most ask the density.
        role = Role.DENSITY if Role.DENSITY in runners else next(iter(runners))
        lanes = _lanes(role, runners[role], golden, best[role].rows, cores)
    return Warm(runners, lanes or cores, best)


def _prove(manifest: Manifest, role: Role, runner: Runner, golden: Mapping[str, Array]) -> None:
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


def _best(role: Role, runner: Runner, golden: Mapping[str, Array]) -> Best:
    """How a graph runs best on this machine, found on its golden inputs."""
    sample, outputs = _sample(role, runner, golden)
    on_card = runner.providers[0] != CPU
    most = LARGEST_ON_CARD if on_card else LARGEST
    # Drawing gains most from large batches and takes longest: fewer and larger steps.
    step = 4 if role in (Role.SAMPLE, Role.GENERATE) else 2
    seconds, growth = TUNING, None
    if role == Role.SAMPLE:
        # Pixel after pixel, a run takes long whatever its rows: four times as many, twice the time.
        seconds, growth = (DRAWING_ON_CARD, 1.0) if on_card else (DRAWING, 2.0)
    return tuning.batch(
        runner, sample, outputs, most=most, step=step, seconds=seconds, growth=growth
    )


def _is_worth_all_cores(
    role: Role, wide: Runner, narrow: Runner, best: Best, golden: Mapping[str, Array]
) -> bool:
    """Whether one row is sooner done on all cores, and no matter for the event loop."""
    sample, outputs = _sample(role, narrow, golden)
    return not best.at_once and tuning.is_sooner(wide, narrow, sample, outputs, seconds=2 * TUNING)


def _lanes(role: Role, runner: Runner, golden: Mapping[str, Array], rows: int, cores: int) -> int:
    """How many runs at once are best on this machine."""
    sample, outputs = _sample(role, runner, golden)
    return tuning.lanes(runner, sample, outputs, rows=rows, most=cores, seconds=2 * TUNING)


def _sample(
    role: Role, runner: Runner, golden: Mapping[str, Array]
) -> tuple[dict[str, Array], list[str]]:
    """A graph's golden inputs, and the names of the outputs that requests ask for."""
    sample = {spec.name: golden[f"{role}/{spec.name}"] for spec in runner.spec.inputs}
    if role is Role.DENSITY:
        return sample, [RANKED]
    return sample, [spec.name for spec in runner.spec.outputs]
