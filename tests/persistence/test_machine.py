"""Which machine this is: the same for ever, never shown, and nothing where it proves nothing."""

from __future__ import annotations

import pytest

from billing_worker.persistence.book.machine import this_machine

ID = "3d1219c7c4c5404aaa1f6d2a48adfda4"


def machine(root, text=ID, **environment):
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/machine-id").write_text(text)
    return this_machine(root, environment)


def test_a_machine_is_known_by_its_id_and_does_not_show_it(tmp_path):
    known = machine(tmp_path, ID + "\n")
    assert known == machine(tmp_path)
    assert known not in {None, machine(tmp_path, ID[::-1])}
    assert ID not in known


@pytest.mark.parametrize("text", ["", "uninitialized\n"])
def test_a_machine_whose_id_is_not_made_yet_is_not_known(tmp_path, text):
    assert machine(tmp_path, text) is None
    assert this_machine(tmp_path / "without", {}) is None


def test_a_container_is_no_machine_whatever_id_its_image_has(tmp_path):
    assert machine(tmp_path, KUBERNETES_SERVICE_HOST="10.0.0.1") is None
    (tmp_path / ".dockerenv").touch()
    assert machine(tmp_path) is None
