"""The sandbox's memory after the end of its process at every point: what was committed is there, once."""

import shutil
from pathlib import Path

from app.sandbox.memory import Memory, ScheduledAction, StoredObject, StoredResponse

FILE = "sandbox.sqlite"
LOG = "sandbox.sqlite-commits"
ANSWER = StoredResponse(b"fingerprint", 200, b"{}", "req_1", 1.0)


def charge(number: int, **body: str) -> StoredObject:
    return StoredObject(f"ch_{number}", "charge", "acct_1", 1_700_000_000 + number, body, parent="pi_1")


def as_after_a_kill(folder: Path, copy: str) -> Path:
    """The files of a memory that is in use, copied as they are."""
    return Path(shutil.copytree(folder, folder.parent / copy)) / FILE


def write_everything(memory: Memory) -> ScheduledAction:
    """One commit with a row of each kind; returns its scheduled action."""
    memory.save(charge(1, status="succeeded"))
    memory.save_event(StoredObject("evt_1", "event", "acct_1", 1_700_000_001, {}, parent="pi_1"), '{"id":"evt_1"}')
    memory.store_response("acct_1", "key", ANSWER)
    action = memory.schedule(5.0, "deliver", "evt_1")
    memory.tally("webhooks:sent")
    memory.commit()
    return action


def check_everything(memory: Memory, action: ScheduledAction) -> None:
    assert memory.get("ch_1").body == {"status": "succeeded"}
    assert [one.id for one in memory.children("pi_1", "charge")] == ["ch_1"]
    assert memory.event("evt_1")[2] == b'{"id":"evt_1"}'
    assert memory.stored_response("acct_1", "key") == ANSWER
    assert memory.scheduled_actions() == [action]
    assert memory.tallies("webhooks:") == {"sent": 1}


def test_commits_in_the_log_survive_a_kill(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    action = write_everything(memory)
    killed = as_after_a_kill(folder, "killed")
    check_everything(memory, action)
    memory.close()
    check_everything(Memory(killed, seed=1), action)
    check_everything(Memory(folder / FILE, seed=1), action)


def test_changes_without_a_commit_do_not_survive(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    memory.save(charge(1))
    memory.commit()
    memory.save(charge(2))
    restored = Memory(as_after_a_kill(folder, "killed"), seed=1)
    assert [one.id for one in restored.all_of_kind("charge")] == ["ch_1"]


def test_a_commit_that_was_cut_off_is_left_out_as_a_whole(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    memory.save(charge(1))
    memory.commit()
    first = (folder / LOG).stat().st_size
    memory.save(charge(2))
    memory.tally("webhooks:sent")
    memory.commit()
    whole = (folder / LOG).read_bytes()
    for size in (first + 1, first + 5, len(whole) - 1):
        killed = as_after_a_kill(folder, f"cut-at-{size}")
        (killed.parent / LOG).write_bytes(whole[:size])
        restored = Memory(killed, seed=1)
        assert [one.id for one in restored.all_of_kind("charge")] == ["ch_1"]
        assert restored.tallies("webhooks:") == {}
        restored.save(charge(3))
        restored.close()
        assert [one.id for one in Memory(killed, seed=1).all_of_kind("charge")] == ["ch_1", "ch_3"]


def test_commits_after_one_that_was_cut_off_survive_the_next_kill(tmp_path: Path) -> None:
    """The rest of a commit alone in the log would be taken for a part of the next one."""
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    memory.save(charge(1))
    memory.commit()
    whole = (folder / LOG).read_bytes()
    for size in (3, 5, len(whole) - 1):
        killed = as_after_a_kill(folder, f"cut-at-{size}")
        (killed.parent / LOG).write_bytes(whole[:size])
        restarted = Memory(killed, seed=1)
        restarted.save(charge(2))
        restarted.commit()
        again = Memory(as_after_a_kill(killed.parent, f"cut-at-{size}-again"), seed=1)
        assert [one.id for one in again.all_of_kind("charge")] == ["ch_2"]


def test_a_log_whose_commits_are_in_sqlite_already_is_not_written_again(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    action = write_everything(memory)
    log = (folder / LOG).read_bytes()
    memory.close()
    assert (folder / LOG).read_bytes() == b""
    (folder / LOG).write_bytes(log)
    check_everything(Memory(folder / FILE, seed=1), action)


def test_a_log_of_another_memory_is_ignored(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    write_everything(Memory(folder / FILE, seed=1))
    killed = as_after_a_kill(folder, "killed")
    for file in killed.parent.glob(f"{FILE}*"):
        if file.name != LOG:
            file.unlink()
    restored = Memory(killed, seed=1)
    assert list(restored.all_of_kind("charge")) == []
    assert restored.tallies("webhooks:") == {}


def test_a_finished_action_does_not_run_again_after_a_kill(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    in_sqlite, in_log = memory.schedule(1.0, "deliver", "evt_1"), memory.schedule(2.0, "deliver", "evt_2")
    memory.commit()
    assert memory.scheduled_actions() == [in_sqlite, in_log]
    last = memory.schedule(3.0, "deliver", "evt_3")
    memory.finish(in_sqlite)
    memory.commit()
    memory.finish(last)
    memory.commit()
    assert Memory(as_after_a_kill(folder, "killed"), seed=1).scheduled_actions() == [in_log]


def test_a_rollback_restores_what_the_log_holds(tmp_path: Path) -> None:
    memory = Memory(tmp_path / FILE, seed=1)
    memory.save(charge(1, status="pending"))
    memory.commit()
    memory.get("ch_1").body["status"] = "failed"
    memory.save(memory.get("ch_1"))
    memory.save(charge(2))
    memory.rollback()
    assert memory.get("ch_1").body == {"status": "pending"}
    assert memory.find("ch_2") is None


def test_many_commits_are_written_without_a_query(tmp_path: Path) -> None:
    """So the log stays small, and so do its commits in memory."""
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    for number in range(1500):
        memory.save(charge(number))
        memory.commit()
    killed = as_after_a_kill(folder, "killed")
    (killed.parent / LOG).unlink()
    assert len(list(Memory(killed, seed=1).all_of_kind("charge"))) == 1000
    assert len(list(Memory(as_after_a_kill(folder, "whole"), seed=1).all_of_kind("charge"))) == 1500


def test_a_payout_is_committed_with_its_lines_or_not_at_all(tmp_path: Path) -> None:
    (folder := tmp_path / "first").mkdir()
    memory = Memory(folder / FILE, seed=1)
    line = StoredObject("txn_1", "balance_transaction", "acct_1", 1, {}, currency="usd", net=100, available_on=1)
    memory.save(line)
    memory.commit()
    memory.assign_to_payout("acct_1", "usd", "po_1", now=2.0)
    assert memory.payable(2.0) == []
    memory.save(StoredObject("po_1", "payout", "acct_1", 2, {}, currency="usd"))
    before = Memory(as_after_a_kill(folder, "before"), seed=1)
    assert (before.payable(2.0), list(before.all_of_kind("payout"))) == ([("acct_1", "usd", 100)], [])
    memory.commit()
    after = Memory(as_after_a_kill(folder, "after"), seed=1)
    assert (after.payable(2.0), [one.id for one in after.all_of_kind("payout")]) == ([], ["po_1"])
