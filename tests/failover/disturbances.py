"""The failures of the cluster. Each function returns once its failure has begun."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.failover.cluster import PatroniCluster
from tests.support.sandbox_process import eventually
from tests.support.silent_host import SilentHost

ROUNDS = 8
ROUND_SECONDS = 0.5
STRICT_CUT_SECONDS = 20.0
# A row for each ended session, whose commit may be absent from the standby.
END_WAITING_SESSIONS = """
select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep' and application_name like 'surety-%'
"""


def switch_over(cluster: PatroniCluster, silent_host: SilentHost) -> str:
    """An orderly change of the primary."""
    cluster.switch_over()
    return "a switchover"


def kill_primary(cluster: PatroniCluster, silent_host: SilentHost) -> str:
    """The primary's first process and its Patroni are killed."""
    node = cluster.require_primary()
    node.kill()
    return f"{node.name} killed"


def cut_replication(cluster: PatroniCluster, silent_host: SilentHost) -> str:
    """The link between the servers is cut, in silence; both keep their connection to etcd.

    Patroni makes the primary go on alone, unless it is strict: then the link is mended after STRICT_CUT_SECONDS.
    """
    cluster.cut_replication()
    if not cluster.is_strict:
        return "the link cut"
    time.sleep(STRICT_CUT_SECONDS)
    cluster.cut_replication(is_cut=False)
    return f"the link cut for {STRICT_CUT_SECONDS:g} s"


def cut_end_and_kill(cluster: PatroniCluster, silent_host: SilentHost) -> str:
    """The link is cut, sessions that wait for the standby are ended, and the primary is killed.

    The commits of these sessions are on the primary alone. Only what waited again may have been acknowledged.
    """
    node = cluster.require_primary()
    cluster.cut_replication()
    ended = 0
    with cluster.connect_to(node) as conn:
        eventually(lambda: conn.execute("select pid from pg_stat_activity where wait_event = 'SyncRep'").fetchone(), 5)
        for _ in range(ROUNDS):
            ended += len(conn.execute(END_WAITING_SESSIONS).fetchall())
            time.sleep(ROUND_SECONDS)
        if conn.execute("select from pg_stat_replication where sync_state = 'sync'").fetchone() is None:
            raise AssertionError("the cut was noticed too early: the standby is no candidate any more")
    node.kill()
    cluster.cut_replication(is_cut=False)
    return f"the link cut, {ended} waiting sessions ended, {node.name} killed"


def silence_first_host(cluster: PatroniCluster, silent_host: SilentHost) -> str:
    """The first host of the address accepts and never answers, and all sessions end with a switchover."""
    silent_host.fall_silent()
    cluster.switch_over()
    return "the first host silent, and a switchover"


def mend(cluster: PatroniCluster, silent_host: SilentHost) -> None:
    """Mend the link, start a Patroni that was killed, and wait until the standby is synchronous again."""
    cluster.cut_replication(is_cut=False)
    for node in cluster.nodes.values():
        if node.process is not None and node.process.poll() is not None:
            node.start()
    cluster.wait_until_synchronous()


Disturbance = Callable[[PatroniCluster, SilentHost], str]
DISTURBANCES: dict[str, Disturbance] = {
    "switchover": switch_over,
    "kill": kill_primary,
    "link-cut": cut_replication,
    "link-cut-and-kill": cut_end_and_kill,
    "silent-host": silence_first_host,
}
