"""`surety up` restarts processes that die, and leaves none behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from app.local.processes import free_port
from db.embedded.folders import temporary_base_folder
from tests.support.http_client import CONTEXT, ServerProcess, payment
from tests.support.sandbox_process import eventually
from tests.support.webhook_receiver import running_receiver

ROOT = Path(__file__).parent.parent.parent
READY_SECONDS_MAX = 90
KEY = re.compile("sty_test_[0-9A-Za-z]{38}")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_", "PG"))}
    kept.pop("DATABASE_URL", None)
    ports = {f"SURETY_{name}_PORT": str(free_port(0)) for name in ("API", "WEBHOOK", "SANDBOX")}
    return kept | ports | more


class Up:
    """`surety up --sandbox` in a folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up", "--sandbox", "--folder", str(folder / ".surety"), *options],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert eventually(lambda: self.process.poll() is not None or "export DATABASE_URL" in self.output(), 90), (
            self.output()
        )
        assert self.process.poll() is None, self.output()
        [self.database] = re.findall("export DATABASE_URL='([^']+)'", self.output())
        [self.api] = re.findall(r"api (http://127\.0\.0\.1:\d+)", self.output())

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> dict[int, str]:
        """The processes that it started, with their commands."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            pid = int(status.parent.name)
            if parent_of(pid) == self.process.pid:
                found[pid] = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def child(self, what: str) -> int:
        [pid] = [pid for pid, command in self.children().items() if what in command]
        return pid

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def parent_of(pid: int) -> int | None:
    """The parent of a process; None if the process has ended, reaped or not."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's user may enter."""
    path = Path(tempfile.mkdtemp(prefix="up-", dir=temporary_base_folder()))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def pay(up: Up, key: str, token: str = "pm_card_visa") -> str:
    answer = httpx.post(
        f"{up.api}/v1/payments",
        json=payment(payment_method={"type": "card", "token": token}),
        headers={"Authorization": f"Bearer {key}", "Idempotency-Key": os.urandom(8).hex()},
        verify=CONTEXT,
        timeout=30,
    )
    return str(answer.json()["id"]) if answer.status_code == 201 else ""


def hear_of_a_payment(up: Up, key: str) -> None:
    """A merchant's endpoint hears of its payment, by a signed webhook."""
    with running_receiver() as receiver:
        made = httpx.post(
            f"{up.api}/v1/webhook_endpoints",
            json={"url": receiver.url, "event_types": ["payment.initiated"]},
            headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "hooks-1"},
            verify=CONTEXT,
            timeout=30,
        )
        assert made.status_code == 201, made.text
        heard = pay(up, key)
        assert eventually(lambda: receiver.received, 60), up.output()
        receiver.received[0].verify(made.json()["secret"])
        assert receiver.received[0].document["data"]["id"] == heard


def payer_page(database: str, payment_id: str) -> str:
    """The page where the payer must act; empty while there is none."""
    with psycopg.connect(database) as conn:
        query = "select next_action ->> 'url' from surety.payments where id = %s"
        [(url,)] = conn.execute(query, (payment_id,)).fetchall()
    return url or ""


def is_settled(database: str, payment_id: str) -> bool:
    try:
        with psycopg.connect(database) as conn:
            row = conn.execute("select state from surety.payments where id = %s", (payment_id,)).fetchone()
    except psycopg.OperationalError:
        return False
    return row == ("settled",)


@pytest.mark.skipif(sys.platform != "linux", reason="parents are read from /proc")
def test_up_restarts_dead_processes_leaves_nothing_and_keeps_its_data(folder: Path) -> None:
    up = Up(folder)
    try:
        assert eventually(lambda: KEY.search(up.output()), 20), up.output()
        [key] = set(KEY.findall(up.output()))
        first = pay(up, key)
        assert eventually(lambda: is_settled(up.database, first), 60), up.output()

        hear_of_a_payment(up, key)

        [key_file] = re.findall("export SURETY_OPERATOR_KEY_FILE='([^']+)'", up.output())
        assert Path(key_file).stat().st_mode & 0o777 == 0o600
        added = subprocess.run(
            [sys.executable, "-m", "app.cli", "merchants", "add", "Acme Toys"],
            env=environment(DATABASE_URL=up.database, SURETY_OPERATOR_KEY_FILE=key_file),
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert added.returncode == 0 and added.stdout.startswith("mer_"), added.stderr

        second = subprocess.run(
            [sys.executable, "-m", "app.cli", "up", "--sandbox", "--folder", str(folder / ".surety")],
            env=environment(), capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"already (process {up.process.pid})" in second.stderr and "Traceback" not in second.stderr

        os.kill(up.child("procrastinate"), signal.SIGKILL)
        os.kill(up.child("app.cli api"), signal.SIGKILL)
        os.kill(up.child("postgres"), signal.SIGKILL)
        assert eventually(lambda: "worker-1 was killed by SIGKILL; it is started again" in up.output(), 20)
        assert eventually(lambda: "postgresql ended; it is started again" in up.output(), 20)
        second_payment = eventually(lambda: try_to_pay(up, key), 60)
        assert eventually(lambda: is_settled(up.database, second_payment), 90), up.output()
        assert re.search(r"^worker-1 +Launching a worker", up.output(), re.MULTILINE)

        left = up.children()
        assert len(left) == 5
        assert up.end(signal.SIGKILL) == -signal.SIGKILL
        assert eventually(lambda: not any(map(parent_of, left)), 20), left

        up = Up(folder, "--no-auto-payer")
        assert KEY.findall(up.output()) == []
        assert is_settled(up.database, first)
        last = pay(up, key)
        assert eventually(lambda: is_settled(up.database, last), 60), up.output()
        asked = pay(up, key, "pm_card_threeDSecure2Required")
        page = eventually(lambda: payer_page(up.database, asked), 60)
        assert "Do you approve the payment" in httpx.get(page, verify=CONTEXT).text
        answered = httpx.post(page, data={"outcome": "approve"}, verify=CONTEXT)
        assert answered.headers["Location"].startswith("https://shop.example/")
        assert eventually(lambda: is_settled(up.database, asked), 60), up.output()
        left = up.children()
        assert up.end(signal.SIGINT) == 130
        assert not any(map(parent_of, left)), up.output()
        assert "SIGINT: all has ended; the data are kept" in up.output()
        assert (folder / ".surety" / "postgresql" / "data").is_dir()
    finally:
        up.process.kill()
        up.process.wait()


def try_to_pay(up: Up, key: str) -> str:
    """A payment's id, or nothing while the API is away."""
    try:
        return pay(up, key)
    except httpx.HTTPError:
        return ""


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ((), {}, "set STRIPE_API_KEY and STRIPE_WEBHOOK_SECRET, or use a sandbox: surety up --sandbox"),
        ((), {"STRIPE_API_KEY": "sk_test_1"}, "STRIPE_WEBHOOK_SECRET is not set"),
        (("--no-auto-payer",), {}, "--no-auto-payer is about the sandbox: add --sandbox"),
        ((), {"STRIPE_API_KEY": "pk_test_1"}, "STRIPE_API_KEY is a publishable key"),
        (("--sandbox",), {"STRIPE_API_KEY": "sk_live_1"}, "must not go to a sandbox"),
        (("--sandbox",), {"STRIPE_API_KEY": "sk_live_sandbox"}, "must not go to a sandbox"),
        (
            ("--folder", "/proc/none"),
            {"SURETY_SANDBOX_URL": "http://x", "STRIPE_WEBHOOK_SECRET": "whsec_1"},
            "can't be made",
        ),
        (
            ("--sandbox",),
            {"DATABASE_URL": "postgresql://localhost:1/none?connect_timeout=1"},
            "PostgreSQL can't be reached",
        ),
    ],
)
def test_failed_start_of_up_is_reported_in_one_line(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", *options],
        cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT), **variables),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_sandbox_is_refused_on_a_live_database(database: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    conn.execute("select surety.set_livemode(true)")
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--sandbox", "--folder", str(tmp_path / "kept")],
        env=environment(DATABASE_URL=database), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, "moves real money" in done.stderr) == (1, True)


@pytest.mark.parametrize(("livemode", "key"), [(False, "sk_live_1"), (True, "rk_test_1")])
def test_up_starts_nothing_with_a_key_of_the_other_mode(
    database: str, conn: psycopg.Connection, tmp_path: Path, livemode: bool, key: str
) -> None:
    conn.execute("select surety.set_livemode(%s)", (livemode,))
    variables = {"DATABASE_URL": database, "STRIPE_API_KEY": key, "STRIPE_WEBHOOK_SECRET": "whsec_1"}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--folder", str(tmp_path / "kept")],
        env=environment(**variables), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"but the database is in {'live' if livemode else 'test'} mode" in done.stderr
    assert "database: " not in done.stdout, "it is not deployed"


@pytest.mark.skipif(sys.platform != "linux", reason="parents are read from /proc")
def test_killed_api_leaves_none_of_its_processes(database: str) -> None:
    api = ServerProcess("api", database, "--processes", "2")
    try:
        assert eventually(lambda: httpx.get(f"{api.url}/health", verify=CONTEXT, timeout=30).status_code == 200, 30)
        stats = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")]
        children = [pid for pid in stats if parent_of(pid) == api.process.pid]
        assert len(children) >= 2
    finally:
        api.process.kill()
        api.process.communicate()
    assert eventually(lambda: not any(map(parent_of, children)), 30)
