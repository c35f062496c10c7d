"""docs/events.md says what the catalogue says. Run as a script it prints the table."""

from __future__ import annotations

import json
import re

from jsonschema import Draft202012Validator

from billing_worker.domain.public_events import CATALOGUE, PublicType
from billing_worker.domain.public_schema import schema
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "events.md").read_text()


def rows() -> list[str]:
    return [
        f"| `{kind}` | {described.meaning} | "
        f"{'; '.join(f'`{d.name}`: {d.meaning}' for d in described.details)} |"
        for kind, described in CATALOGUE.items()
    ]


def test_the_catalogue_of_the_page_is_the_one_of_the_code():
    table = PAGE.split("| type | when |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert table == rows()


def test_every_public_type_is_described():
    assert list(CATALOGUE) == list(PublicType)


def test_the_example_of_the_page_fits_its_schema():
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    Draft202012Validator(schema(PublicType(example["type"]))).validate(example)


if __name__ == "__main__":
    print("\n".join(rows()))
