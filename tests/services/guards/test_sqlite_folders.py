"""A folder with an SQLite book that is copied, moved or put back: which of the two may sell."""

from __future__ import annotations

import shutil

import pytest

from billing_worker.persistence.book.outside import FileRecord
from billing_worker.persistence.store import Store
from billing_worker.services import kill_switch
from billing_worker.services.guards import lost_memory
from tests.services.guards.test_lost_memory import HOUR, MINUTE, alerts, restored_at
from tests.support.world import World


@pytest.fixture
def kept_in_a_file(sqlite_template, tmp_path):
    (tmp_path / "home").mkdir()
    shutil.copy(sqlite_template, tmp_path / "home" / "billing.db")
    return opened(tmp_path / "home")


def opened(folder, beside=None, machine=None):
    """A worker on the books in this folder. `beside`: one whose gateway it shares."""
    world = World(Store(f"sqlite:///{folder / 'billing.db'}"))
    if beside is not None:
        world.sandbox, world.clock, world.transport = beside.sandbox, beside.clock, beside.transport
    world.outside = (FileRecord(folder / "billing.db", machine),)
    world.ports = world.ports_of_a_worker()
    return world


def goes_on(world, reference):
    world.subscribe("approved", reference)
    world.tick()
    world.store.close()
    return world.sales(f"{reference}-p0-a1") == 1


def test_a_process_that_looks_while_another_one_charges_first_sees_no_copy(
    kept_in_a_file, tmp_path, monkeypatch
):
    world, beside, seen = kept_in_a_file, opened(tmp_path / "home", kept_in_a_file), []
    begin = FileRecord.begin

    def look_and_begin(keeper, record):
        with beside.store.reading() as connection:
            seen.append(lost_memory.why_it_is_a_copy(connection, beside.outside))
        begin(keeper, record)

    monkeypatch.setattr(FileRecord, "begin", look_and_begin)
    world.subscribe("approved")
    world.tick()
    assert seen == [None]
    assert world.fate() == "paid"
    assert lost_memory.poll(beside.ports)
    assert not alerts(world, "book.refused")


def test_a_file_that_is_copied_elsewhere_alone_is_a_copy(kept_in_a_file, tmp_path):
    assert goes_on(kept_in_a_file, "sub-1")
    (tmp_path / "else").mkdir()
    shutil.copy(tmp_path / "home" / "billing.db", tmp_path / "else" / "billing.db")
    copy = opened(tmp_path / "else", kept_in_a_file)
    assert not goes_on(copy, "sub-2")
    (said,) = alerts(copy, "book.refused")
    assert "billing.db.outside" in said
    start_moved(copy)
    assert goes_on(copy, "sub-3")


def test_a_folder_that_is_copied_beside_its_original_is_a_copy(kept_in_a_file, tmp_path):
    assert goes_on(kept_in_a_file, "sub-1")
    shutil.copytree(tmp_path / "home", tmp_path / "else")
    assert not goes_on(opened(tmp_path / "else", kept_in_a_file), "sub-2")
    assert goes_on(opened(tmp_path / "home", kept_in_a_file), "sub-3")


def start_moved(world):
    kill_switch.switch(world.store, on=True, service=None, by="operator:ann", reason="r",
                 now=world.clock.now(), moved=True, outside=world.outside)  # fmt: skip


@pytest.mark.parametrize("path", ["home", "else"])
def test_a_folder_that_comes_to_another_machine_is_a_copy(kept_in_a_file, tmp_path, path):
    """Its original cannot be seen from there, at the same path or at another one."""
    original = opened(tmp_path / "home", kept_in_a_file, "one")
    assert goes_on(original, "sub-1")
    shutil.move(tmp_path / "home", tmp_path / "there")
    shutil.move(tmp_path / "there", tmp_path / path)
    copy = opened(tmp_path / path, kept_in_a_file, "two")
    assert not goes_on(copy, "sub-2")
    (said,) = alerts(copy, "book.refused")
    assert "on another machine" in said
    assert "sales start --moved" in said
    start_moved(copy)
    assert goes_on(copy, "sub-3")
    assert not goes_on(opened(tmp_path / path, kept_in_a_file, "one"), "sub-4")


def test_a_book_of_before_machines_were_kept_learns_its_own(kept_in_a_file, tmp_path):
    assert goes_on(kept_in_a_file, "sub-1")
    assert goes_on(opened(tmp_path / "home", kept_in_a_file, "one"), "sub-2")
    kept = opened(tmp_path / "home", kept_in_a_file, "two").outside[0].read("")
    assert kept.machine == "one"
    assert [sale.reference_id for sale in kept.sales] == ["sub-1-p0-a1", "sub-2-p0-a1"]
    assert not goes_on(opened(tmp_path / "home", kept_in_a_file, "two"), "sub-3")


def test_a_folder_goes_on_in_a_container_that_knows_no_machine(kept_in_a_file, tmp_path):
    assert goes_on(opened(tmp_path / "home", kept_in_a_file, "one"), "sub-1")
    assert goes_on(opened(tmp_path / "home", kept_in_a_file), "sub-2")
    assert goes_on(opened(tmp_path / "home", kept_in_a_file, "one"), "sub-3")


def test_a_folder_that_is_moved_as_a_whole_goes_on_as_restored_books(kept_in_a_file, tmp_path):
    assert goes_on(kept_in_a_file, "sub-1")
    shutil.move(tmp_path / "home", tmp_path / "else")
    moved = opened(tmp_path / "else", kept_in_a_file)
    assert goes_on(moved, "sub-2")
    assert restored_at(moved) is not None
    (said,) = alerts(moved, "book.moved")
    assert "stop one of the two" in said


def test_a_folder_that_is_copied_to_another_machine_does_not_charge_what_its_original_has(
    kept_in_a_file, tmp_path
):
    assert goes_on(kept_in_a_file, "sub-1")
    shutil.copytree(tmp_path / "home", tmp_path / "else")
    original = opened(tmp_path / "home", kept_in_a_file)
    original.subscribe("approved", "sub-2")
    shutil.copy(tmp_path / "home" / "billing.db", tmp_path / "else" / "billing.db")
    original.tick()
    original.store.close()
    shutil.move(tmp_path / "home", tmp_path / "hidden")  # as another machine sees it
    copy = opened(tmp_path / "else", original)
    copy.clock.advance(MINUTE)
    copy.run_for(HOUR, step=5 * MINUTE)
    assert copy.debits() == {"sub-1-p0": 1, "sub-2-p0": 1}
    assert copy.sales("sub-2-p0-a1") == 1
    assert len(alerts(copy, "book.moved")) == 1


def test_a_file_that_is_put_back_from_a_backup_is_noticed(kept_in_a_file, tmp_path):
    assert goes_on(kept_in_a_file, "sub-1")
    shutil.copy(tmp_path / "home" / "billing.db", tmp_path / "backup.db")
    assert goes_on(kept_in_a_file, "sub-2")
    shutil.copy(tmp_path / "backup.db", tmp_path / "home" / "billing.db")
    kept_in_a_file.bell.messages.clear()
    kept_in_a_file.subscribe("approved", "sub-2")
    kept_in_a_file.run_for(HOUR, step=5 * MINUTE)
    assert kept_in_a_file.debits() == {"sub-1-p0": 1, "sub-2-p0": 1}
    assert kept_in_a_file.sales("sub-2-p0-a1") == 1
    assert restored_at(kept_in_a_file) is not None


def test_a_file_that_is_put_back_twice_is_not_taken_for_the_copy_of_another(
    kept_in_a_file, tmp_path
):
    assert goes_on(kept_in_a_file, "sub-1")
    shutil.copy(tmp_path / "home" / "billing.db", tmp_path / "backup.db")
    assert goes_on(kept_in_a_file, "sub-2")
    for again in ("sub-3", "sub-4"):
        shutil.copy(tmp_path / "backup.db", tmp_path / "home" / "billing.db")
        kept_in_a_file.bell.messages.clear()
        kept_in_a_file.clock.advance(MINUTE)
        assert goes_on(kept_in_a_file, again)
    assert alerts(kept_in_a_file, "book.refused") == []
