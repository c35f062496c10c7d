"""`billing-worker cards list | use | replace | add-backup | remove | tokenise`."""

from __future__ import annotations

import secrets
from typing import IO, Any

import click

from billing_worker import config
from billing_worker.clock import SystemClock
from billing_worker.config import Settings
from billing_worker.domain.errors import InvalidInput
from billing_worker.entrypoints import unique_json
from billing_worker.entrypoints.cli.hand_out import hand_out_page, html_option
from billing_worker.entrypoints.cli.shared import (
    by_option,
    decided_at_option,
    json_object,
    json_option,
    open_store,
    print_json,
    print_table,
    settings_for,
)
from billing_worker.entrypoints.cli.vault_keys import open_vault
from billing_worker.entrypoints.cli.what_follows import what_follows
from billing_worker.entrypoints.unique_json import KeyTwice
from billing_worker.persistence.store import Store
from billing_worker.services.cards.listing import list_cards
from billing_worker.services.cards.new_card import Scope, add_backup_card, replace_card, use_card
from billing_worker.services.cards.remove import remove_card
from billing_worker.services.hosted_pages.card_setup import start_tokenisation
from billing_worker.services.import_records.subscription import (
    BadRecord,
    CardRecord,
    CardSchema,
    card_from,
    loaded,
)

card_option = click.option(
    "--card",
    "file",
    type=click.File(),
    default="-",
    help='JSON with "token" and, if known, mask, brand, expiry_month and expiry_year; '
    "default: standard input. Not an argument, because every user of the machine sees those.",
)


@click.group()
def cards() -> None:
    """List, replace and add the cards that subscriptions are paid with."""


@cards.command("list")
@click.argument("customer")
@json_option
def list_(customer: str, *, as_json: bool) -> None:
    """List a customer's cards, what each pays for, and why one cannot be charged.

    CUSTOMER is the customer's reference, or that of one of their subscriptions.

    \b
    Example:
      billing-worker cards list cust-1
    """
    with open_store(settings_for(*config.DATABASE)) as store, store.reading() as connection:
        rows = list_cards(connection, customer, SystemClock().now())
    if rows is None:
        raise click.ClickException(f"no customer and no subscription {customer!r}")
    if as_json:
        print_json(rows)
        return
    columns = (
        "card_id", "holder", "mask", "brand", "expires", "issuer", "default", "default_for",
        "backup", "not_chargeable",
    )  # fmt: skip
    print_table("", columns, [[_shown(row[column]) for column in columns] for row in rows])


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "yes" if value is True else value or "-"


_scope_option = click.option(
    "--scope",
    type=click.Choice([scope.value for scope in Scope]),
    default=Scope.SUBSCRIPTION.value,
    help="What it pays from now on: the subscription, or all of the customer's that the replaced "
    "card has paid.",
)


@cards.command()
@click.argument("subscription")
@card_option
@_scope_option
@by_option
@click.option("--why", help="Reason in the history.")
@decided_at_option
@json_option
def replace(
    subscription: str, file: IO[str], by: str, scope: str, *, as_json: bool, **when: Any
) -> None:
    """Give a subscription another default card. Unpaid invoices that wait for a card are charged.

    The oldest is charged now, the others a day apart. What is older than 62 days waits for a person.

    \b
    Example:
      billing-worker cards replace sub-1 --by ann < card.json
    """
    done = _do(replace_card, subscription, file, by=f"operator:{by}", scope=Scope(scope), **when)
    _print_given(subscription, done, as_json=as_json)


@cards.command()
@click.argument("subscription")
@click.argument("card_id", type=int, metavar="CARD")
@_scope_option
@by_option
@click.option("--why", help="Reason in the history.")
@decided_at_option
@json_option
def use(
    subscription: str, card_id: int, by: str, scope: str, *, as_json: bool, **when: Any
) -> None:
    """Let a stored card pay a subscription. CARD is its number in `cards list`.

    \b
    Example:
      billing-worker cards use sub-1 7 --why "asked on the phone"
    """
    settings = settings_for(*config.DATABASE)
    with open_store(settings, decides=True) as store:
        try:
            done = use_card(
                store, SystemClock(), subscription_reference=subscription, card_id=card_id,
                by=f"operator:{by}", scope=Scope(scope), **when,
            )  # fmt: skip
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None
        done = _with_next(store, settings, done)
    _print_given(subscription, done, as_json=as_json)


def _with_next(store: Store, settings: Settings, done: dict[str, Any]) -> dict[str, Any]:
    """Say what really happens to each invoice that the card is tried on: a wait may hold it back."""
    tried = done.get("tried", ())
    return done | {"next": {name: what_follows(store, settings, name) for name in tried}}


@cards.command()
@click.argument("customer")
@click.argument("card_id", type=int, metavar="CARD")
@by_option
@click.option("--why", help="Reason in the history.")
@json_option
def remove(customer: str, card_id: int, by: str, why: str | None, *, as_json: bool) -> None:
    """Forget a customer's card. Refused while it pays a subscription.

    \b
    Example:
      billing-worker cards remove cust-1 7 --why "the customer asked for it"
    """
    with open_store(settings_for(*config.DATABASE), decides=True) as store:
        try:
            done = remove_card(
                store, SystemClock(), customer=customer, card_id=card_id, by=f"operator:{by}",
                why=why,
            )  # fmt: skip
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        print_json(done)
        return
    click.echo(f"Card {card_id} of {customer}: {done['outcome']}, it cannot be charged any more.")


def _print_given(subscription: str, done: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    click.echo(f"{subscription} is paid with card {done['card_id']} from now on.")
    others = [name for name in done["subscriptions"] if name != subscription]
    later = [f"{one['invoice']} at {one['at']}" for one in done["later"]]
    if not done["tried"]:
        click.echo("  tried: nothing waits")
    for invoice, follows in done["next"].items():
        click.echo(f"  tried: {invoice}. {follows}")
    for title, names in (
        ("paid with it as well", others),
        ("still on the old card", done["on_the_old_card"]),
        ("tried later", later),
        ("left to a person", done["for_a_person"]),
        ("still in flight with the old card", done["in_flight"]),
    ):
        if names:
            click.echo(f"  {title}: {', '.join(names)}")


@cards.command("add-backup")
@click.argument("subscription")
@card_option
@by_option
@click.option("--consent", required=True, help="Where the customer's permission is recorded.")
@json_option
def add_backup(subscription: str, file: IO[str], by: str, consent: str, *, as_json: bool) -> None:
    """Add a card that is charged only when the default card is refused for good.

    \b
    Example:
      billing-worker cards add-backup sub-1 --consent "form 17" < card.json
    """
    done = _do(add_backup_card, subscription, file, by=f"operator:{by}", consent=consent)
    if as_json:
        print_json(done)
        return
    click.echo(f"Card {done['card_id']} is a backup for {subscription}.")


@cards.command()
@click.option("--reference", help="Your own key; repeated, it returns the same page.")
@click.option("--customer", required=True, help="The customer's reference id.")
@click.option("--name", help="Stored for a new customer.")
@click.option("--email", help="Stored for a new customer.")
@click.option("--amount", help='In major units, such as "1.00"; not needed with --invoice.')
@click.option("--currency", help="Three letters; not needed with --invoice.")
@click.option("--invoice", help="An open invoice that the payment pays.")
@click.option("--phone", help="The customer's; sent to the gateway, not stored.")
@click.option("--metadata", callback=json_object, help="A JSON object; the gateway echoes it.")
@click.option("--description")
@click.option("--return-url", help="Where the customer returns to.")
@html_option
@json_option
def tokenise(customer: str, name: str | None, email: str | None, **options: Any) -> None:
    """Open a page on which a customer pays once. The card can be charged from then on.

    \b
    Example:
      billing-worker cards tokenise --customer c-1 --amount 1.00 --currency USD
    """
    as_json, file = options.pop("as_json"), options.pop("html")
    reference = options.pop("reference") or f"card-page-{secrets.token_hex(8)}"
    person = {"reference_id": customer, "name": name, "email": email}
    hand_out_page(
        start_tokenisation,
        {"reference_id": reference, "customer": person, **options},
        as_json=as_json,
        file=file,
    )


def _do(ask: Any, subscription: str, file: IO[str], **options: Any) -> dict[str, Any]:
    settings = settings_for(*config.DATABASE, *config.VAULT)
    card = _read(file)
    with open_store(settings, decides=True) as store:
        vault = open_vault(settings, store)
        try:
            done: dict[str, Any] = ask(
                store, vault, SystemClock(), subscription_reference=subscription, card=card,
                **options,
            )  # fmt: skip
        except InvalidInput as error:
            raise click.ClickException(str(error)) from None
        return _with_next(store, settings, done)


def _read(file: IO[str]) -> CardRecord:
    try:
        card = card_from(loaded(CardSchema(), unique_json.loads(file.read())))
    except KeyTwice as error:
        raise click.ClickException(f"the card is refused: {error}") from None
    except ValueError:
        raise click.ClickException("the card is not JSON") from None
    except BadRecord as bad:
        raise click.ClickException(str(bad)) from None
    assert card is not None  # noqa: S101 - there is a token; tells mypy
    return card
