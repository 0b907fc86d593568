"""`lifecycle --against REV --dbos`: the present code, another revision's and DBOS, in turns.

Each measurement starts its processes anew, warms them up, and uses a new database. The other revision has a server of
its own. Ratios are medians of the turns' ratios; NAME is `base` or `dbos`.

    ratio_to_NAME       payments per second
    cpu_ratio_to_NAME   CPU time of workers and PostgreSQL for a payment
    wal_ratio_to_NAME   write-ahead log for a payment
    idle_ratio_to_base  milliseconds until the provider receives a payment on an idle system
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from app.local.processes import interruptible
from tests.bench import dbos_services, lifecycle
from tests.bench.databases import Results, log_progress, median_ratio, median_results, warm_server
from tests.bench.dbos_services import installed_dbos
from tests.bench.revisions import OtherRevision, checked_out

OURS = "ours"


def run(
    *, against: str | None, base_payments: int, dbos: bool, on_disk: bool, rounds: int, warm_mb: int, **sizes: int
) -> Results:
    """The present code's results, the others', and the ratios."""
    with interruptible(), ExitStack() as stack:
        server_url = stack.enter_context(warm_server(warm_mb, on_disk=on_disk))
        measures = {OURS: partial(lifecycle.measure, server_url, rounds=1, **sizes)}
        if against is not None:
            base_url = stack.enter_context(warm_server(warm_mb, on_disk=on_disk))
            base = OtherRevision(stack.enter_context(checked_out(against)), base_url)
            measures["base"] = partial(base.measure, slow_payments=base_payments, **sizes)
        if dbos:
            packages = stack.enter_context(installed_dbos())
            fewer = sizes | {"payments": base_payments}
            measures["dbos"] = partial(dbos_services.measure, server_url, packages, rounds=1, **fewer)
        turns = measure_in_turns(measures, rounds)
    ours, others = turns.pop(OURS), turns
    results = median_results(ours) | {"rounds": [each["payments_per_second"] for each in ours], "against": against}
    for name, measured in others.items():
        results[name] = median_results(measured) | {"rounds": [each["payments_per_second"] for each in measured]}
        results |= compare_with(name, ours, measured)
    return results


def measure_in_turns(measures: Mapping[str, Callable[[], Results]], rounds: int) -> dict[str, list[Results]]:
    """The results of each in all turns; every other turn has the opposite order."""
    turns: dict[str, list[Results]] = {name: [] for name in measures}
    for turn in range(rounds):
        for name in list(measures)[:: -1 if turn % 2 else 1]:
            results = measures[name]()
            turns[name].append(results)
            log_progress(
                f"turn {turn + 1}, {name}: {results['payments_per_second']:,.1f} payments/s,"
                f" CPU ms per payment: {results['cpu_ms_per_payment']}"
            )
    return turns


def compare_with(name: str, ours: Sequence[Results], others: Sequence[Results]) -> Results:
    """Ours compared with another's."""

    def compare(value: Callable[[Results], float]) -> float:
        return median_ratio([value(each) for each in ours], [value(each) for each in others])

    ratios = {
        f"ratio_to_{name}": compare(lambda each: float(each["payments_per_second"])),
        f"cpu_ratio_to_{name}": compare(lambda each: cpu_of_work(each["cpu_ms_per_payment"])),
        f"wal_ratio_to_{name}": compare(lambda each: float(each["wal_kb_per_payment"])),
    }
    if all("idle_p50_ms" in each for each in (*ours, *others)):
        ratios[f"idle_ratio_to_{name}"] = compare(lambda each: float(each["idle_p50_ms"]))
    return ratios


def cpu_of_work(cpu_ms: dict[str, float]) -> float:
    """The CPU time of workers and PostgreSQL."""
    return cpu_ms["workers"] + cpu_ms["postgres"]
