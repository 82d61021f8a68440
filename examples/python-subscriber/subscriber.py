"""A subscriber to sign-ups: keeps in a database of its own who has signed up.

Takes events from a durable consumer of NATS JetStream, one at a time, and has each of them take effect once,
whatever is killed when:

- An event is acknowledged after its effect, so it may come again. Its id is written in the same transaction
  as the effect; an id that is there already has nothing left to do.
- What fails for now is tried again later, and later each time. What fails for good, or too often, is parked:
  written to a file and taken out of the consumer. Nothing disappears.
- While an event is worked on, the server is told so; it would give the event to somebody else otherwise.

To make it yours, change `take_effect`. To go faster, run it several times: the copies share the consumer.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sqlite3
import sys

import nats
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, Error as NatsError, TimeoutError as NatsTimeout

# An event that failed so often is parked.
TRIES_MAX = 20
# The first pause after a failure, doubled each time, and the longest, in seconds.
PAUSE_FIRST, PAUSE_LONGEST = 1.0, 300.0
# So long one request for an event stands at the server. A stop takes as long at most.
PATIENCE = 2.0

log = logging.getLogger("subscriber")


class Poison(Exception):
    """No number of tries will help."""


def take_effect(event: dict, database: sqlite3.Connection) -> None:
    """What this subscriber is for. Runs in a transaction that also notes that the event was handled.

    Events of one person may arrive out of order after a retry. Ids sort by time, so an older event does not
    overwrite what a newer one said.
    """
    data = event["data"]
    database.execute(
        """
        INSERT INTO people (person, email, kind, last_event, events) VALUES (?, ?, ?, ?, 1)
        ON CONFLICT (person) DO UPDATE SET
            email = iif(excluded.last_event > last_event, excluded.email, email),
            kind = iif(excluded.last_event > last_event, excluded.kind, kind),
            last_event = max(last_event, excluded.last_event),
            events = events + 1
        """,
        (event["subject"], data.get("email"), kind_of(event), event["id"]),
    )


def kind_of(event: dict) -> str:
    return event["type"].removeprefix("dev.vestibule.signup.")


def read(body: bytes) -> dict:
    """Takes what it knows and ignores what it does not: events of version 1 only ever gain members and kinds."""
    try:
        event = json.loads(body)
        version = event["dataschema"].rpartition(":")[2]
        if event["specversion"] != "1.0" or version != "1":
            raise Poison(f"an event of version {version}, and this subscriber knows version 1")
        # Whatever is missing is missed here and not halfway.
        event["id"], event["subject"], event["type"], event["data"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Poison(f"not an event: {type(error).__name__}") from None
    return event


def handle(event: dict, database: sqlite3.Connection) -> bool:
    """Says whether there was anything left to do."""
    with database:
        database.execute("BEGIN IMMEDIATE")
        fresh = database.execute("INSERT OR IGNORE INTO handled (id) VALUES (?)", (event["id"],)).rowcount == 1
        if fresh:
            take_effect(event, database)
    return fresh


def open_database(path: str) -> sqlite3.Connection:
    # The thread changes, but there is one at a time.
    database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.executescript(
        """
        CREATE TABLE IF NOT EXISTS handled (id TEXT PRIMARY KEY) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS people (
            person TEXT PRIMARY KEY, email TEXT, kind TEXT NOT NULL, last_event TEXT NOT NULL, events INTEGER NOT NULL
        );
        """
    )
    return database


def park(message: Msg, why: str, path: str) -> None:
    """Durable before the event leaves the consumer. The file holds personal data, as events do."""
    letter = {
        "sequence": message.metadata.sequence.stream,
        "subject": message.subject,
        "why": why,
        "event": message.data.decode(errors="backslashreplace"),
    }
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (json.dumps(letter) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def pause_after(tries: int, chance: float) -> float:
    """In seconds. Chance, from 0 to 1, keeps what failed together from coming back together."""
    return min(PAUSE_FIRST * 2 ** min(tries - 1, 30), PAUSE_LONGEST) * (0.5 + chance / 2)


@contextlib.asynccontextmanager
async def heartbeats(message: Msg, every: float):
    """Tells the server that the event is being worked on."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(every)
            await message.in_progress()

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        # A heartbeat that could not be sent costs a redelivery at worst.
        await asyncio.gather(beating, return_exceptions=True)


async def deal_with(message: Msg, database: sqlite3.Connection, parked: str, ack_wait: float) -> None:
    number, tries = message.metadata.sequence.stream, message.metadata.num_delivered
    try:
        event = read(message.data)
        async with heartbeats(message, ack_wait / 3):
            fresh = await asyncio.to_thread(handle, event, database)
    except Exception as error:
        # The text of an error may quote what it failed on, which is personal data; its name does not.
        why = str(error) if isinstance(error, Poison) else type(error).__name__
        for_now = isinstance(error, sqlite3.OperationalError) and tries < TRIES_MAX
        if for_now:
            pause = pause_after(tries, random.random())
            log.warning("event %d failed for now (%s): again in %.1f s", number, why, pause)
            await message.nak(delay=pause)
        else:
            await asyncio.to_thread(park, message, why, parked)
            log.error("event %d was parked: %s", number, why)
            await message.term()
        return
    await message.ack()
    log.info("%s %s %s of %s", "handled" if fresh else "had handled", kind_of(event), event["id"], event["subject"])


async def run() -> None:
    stream, consumer = os.environ.get("STREAM", "SIGNUPS"), os.environ["CONSUMER"]
    parked = os.environ.get("PARKED", "parked.jsonl")
    database = open_database(os.environ.get("DATABASE", "people.db"))

    stopping = asyncio.Event()

    async def lost() -> None:
        if not stopping.is_set():
            log.warning("the connection is lost; trying to get it back")

    async def back() -> None:
        log.info("the connection is back")

    async def failed(error: Exception) -> None:
        log.warning("%s", error)

    client = await nats.connect(
        os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),
        name=consumer,
        user=os.environ.get("NATS_USER", consumer),
        password=os.environ["NATS_PASSWORD"],
        # Whoever may listen to an inbox reads what comes to it, so each user has a prefix of its own.
        inbox_prefix=os.environ.get("INBOX_PREFIX", f"_INBOX_{consumer}"),
        max_reconnect_attempts=-1,
        ping_interval=5,
        disconnected_cb=lost,
        reconnected_cb=back,
        error_cb=failed,
    )
    # Until here there is nothing in hand, and a signal ends us at once.
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_, stopping.set)
    stream_client = client.jetstream()
    # The consumer exists: an operator made it, and this user may not change it.
    ack_wait = (await stream_client.consumer_info(stream, consumer)).config.ack_wait
    subscription = await stream_client.pull_subscribe_bind(consumer=consumer, stream=stream)
    log.info("taking events of %s from %s", consumer, stream)
    while not stopping.is_set():
        try:
            [message] = await subscription.fetch(1, timeout=PATIENCE)
        except NatsTimeout:
            continue  # nothing new, or no connection
        except ConnectionClosedError:
            sys.exit("the connection is closed for good")
        except NatsError as error:
            log.warning("could not ask for events: %s", error)
            await asyncio.sleep(PATIENCE)
            continue
        await deal_with(message, database, parked, ack_wait)
    # Sends what is still unsent, acknowledgements above all. If it cannot be, the events come again.
    with contextlib.suppress(NatsError, asyncio.TimeoutError):
        await client.flush(timeout=5)
    await client.close()
    database.close()
    log.info("stopped")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    asyncio.run(run())
