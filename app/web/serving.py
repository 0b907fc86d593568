"""Serving an application by uvicorn: one process or several on one socket, ended after a signal."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import threading
import time
from functools import partial
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import click
import uvicorn
from uvicorn.importer import import_from_string
from uvicorn.supervisors import Multiprocess

from app.connection_limits import ConnectionLimits
from app.graceful_stop import stoppable_server
from app.web.load_shedding import LoadSheddingProtocol
from db.errors import SuretyError
from db.logs import logging_config

log = logging.getLogger("surety.serving")

BACKLOG = 2048
# Connections may exceed their bound while they are refused.
OPEN_FILES = 3 * ConnectionLimits().connections + ConnectionLimits().held
SHUTDOWN_SECONDS_MAX = 20
GRACE_SECONDS = 5


class AddressUnavailable(SuretyError):
    """The address is in use, or is not one of this machine's."""


def serve(factory: str, *, name: str, host: str, port: int, processes: int = 1) -> None:
    """Serve `module:factory` until SIGINT or SIGTERM, then finish the requests under way. Logs name the process `name`.

    Prints `listening on HOST:PORT` once connections are accepted; port 0 takes a free one. With several processes, one
    that dies is replaced, and all of them end with their parent, even if it is killed.
    """
    config = uvicorn.Config(
        partial(load_application, factory),
        factory=True,
        loop="uvloop",
        http=LoadSheddingProtocol,
        ws="none",
        lifespan="on",
        log_config=logging_config(name),
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS_MAX,
        workers=processes,
    )
    try:
        listening = listen(host, port)
    except OSError as error:
        raise AddressUnavailable(f"can't listen on {host}:{port}: {error.strerror}") from None
    listening.set_inheritable(True)
    raise_open_files_limit()
    server = ServingProcesses(config, sockets=[listening]) if processes > 1 else stoppable_server(config)
    address, taken = listening.getsockname()[:2]
    click.echo(f"listening on {f'[{address}]' if ':' in address else address}:{taken}")
    with listening:
        if isinstance(server, ServingProcesses):
            server.run()
        else:
            server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. An IPv6 address has a colon; `::` stands for all addresses of both families."""
    if ":" not in host:
        return socket.create_server((host, port), backlog=BACKLOG)
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=both)


def raise_open_files_limit() -> None:
    """Allow this process and its children as many open files as its bound of connections needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class ServingProcesses(Multiprocess):
    """Several processes. One that does not end in time is killed, so that a restart is not blocked."""

    def join_all(self) -> None:
        deadline = time.monotonic() + SHUTDOWN_SECONDS_MAX + GRACE_SECONDS
        for one in self.processes:
            one.process.join(max(0.0, deadline - time.monotonic()))
            if one.process.is_alive():
                log.error("process %s does not end: killed", one.pid)
                one.process.kill()
                one.process.join()


def load_application(factory: str) -> Any:
    """The application, in the process that serves it."""
    if (parent := parent_process()) is not None:
        threading.Thread(target=terminate_with_parent, args=(parent,), daemon=True).start()
    return import_from_string(factory)()


def terminate_with_parent(parent: BaseProcess) -> None:
    """End once the parent is gone, so that its successor finds the port free."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
