-- The business data. Events are immutable and live in the log; here is what was made of them.
-- Ids of events are UUIDv7 as 16 bytes, so that they sort by time; times are RFC 3339 text in UTC.

CREATE TABLE people (
    person      TEXT PRIMARY KEY,          -- the pseudonym
    email       TEXT,
    claims      TEXT NOT NULL,             -- JSON, with what the decision changed
    status      TEXT NOT NULL,             -- the kind of the newest event
    first_event BLOB NOT NULL,
    last_event  BLOB NOT NULL,             -- an older event than this changes nothing but the counter
    changes     INTEGER NOT NULL,          -- always the number of rows in person_changes
    created_at  TEXT NOT NULL,
    updated_at  TEXT NOT NULL
) STRICT;

CREATE TABLE sign_ups (
    event_id       BLOB PRIMARY KEY,
    person         TEXT NOT NULL REFERENCES people (person) DEFERRABLE INITIALLY DEFERRED,
    connector      TEXT NOT NULL,
    step           TEXT NOT NULL,
    kind           TEXT NOT NULL,
    client         TEXT,
    locale         TEXT,
    identities     TEXT NOT NULL,          -- JSON
    claims         TEXT NOT NULL,          -- JSON, as the platform sent them
    changed_claims TEXT NOT NULL,          -- JSON, what the decision changed
    occurred_at    TEXT NOT NULL,
    recorded_at    TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX sign_ups_of_person ON sign_ups (person, event_id);

-- Without uniqueness on purpose: a second row for an event is the proof that an effect happened
-- twice. What prevents it are the keys of sign_ups and inbox.
CREATE TABLE person_changes (
    id         INTEGER PRIMARY KEY,
    event_id   BLOB NOT NULL REFERENCES sign_ups (event_id),
    person     TEXT NOT NULL,
    applied    INTEGER NOT NULL,           -- 0: a newer event was there already, so only counted
    changed_at TEXT NOT NULL
) STRICT;
CREATE INDEX person_changes_of_event ON person_changes (event_id);

CREATE TABLE grants (
    person     TEXT NOT NULL,
    role       TEXT NOT NULL,
    reason     TEXT NOT NULL,              -- the rule
    event_id   BLOB NOT NULL,
    granted_at TEXT NOT NULL,
    expires_at TEXT,
    revoked_at TEXT,
    PRIMARY KEY (person, role)
) STRICT, WITHOUT ROWID;

-- One row for each time a set of roles, possibly empty, was granted; a proof like person_changes.
CREATE TABLE grant_sets (
    id         INTEGER PRIMARY KEY,
    event_id   BLOB NOT NULL,
    worker     TEXT NOT NULL,
    person     TEXT NOT NULL,
    roles      INTEGER NOT NULL,
    granted_at TEXT NOT NULL
) STRICT;
CREATE INDEX grant_sets_of_event ON grant_sets (event_id);

CREATE TABLE notifications (
    event_id        BLOB NOT NULL,
    worker          TEXT NOT NULL,
    channel         TEXT NOT NULL,
    person          TEXT NOT NULL,
    state           TEXT NOT NULL CHECK (state IN ('sending', 'sent', 'recorded')),
    idempotency_key TEXT NOT NULL,
    subject         TEXT,
    body            TEXT,
    provider_id     TEXT,
    tries           INTEGER NOT NULL,
    begun_at        TEXT NOT NULL,
    finished_at     TEXT,
    PRIMARY KEY (event_id, worker, channel)
) STRICT, WITHOUT ROWID;

CREATE TABLE inbox (
    worker   TEXT NOT NULL,
    event_id BLOB NOT NULL,
    done_at  TEXT NOT NULL,
    PRIMARY KEY (worker, event_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    id          INTEGER PRIMARY KEY,
    worker      TEXT NOT NULL,
    event_id    BLOB NOT NULL,
    sequence    INTEGER NOT NULL,
    started_at  TEXT NOT NULL,
    took_ms     INTEGER NOT NULL,
    cause_class TEXT NOT NULL,
    error       TEXT NOT NULL
) STRICT;
CREATE INDEX attempts_at_event ON attempts (event_id, worker, id);

CREATE TABLE dead_letters (
    id          INTEGER PRIMARY KEY,
    worker      TEXT NOT NULL,
    event_id    BLOB,                      -- NULL where the bytes are not an event
    person      TEXT,
    sequence    INTEGER NOT NULL,
    payload     BLOB NOT NULL,
    cause_class TEXT NOT NULL,
    error       TEXT NOT NULL,
    parked_at   TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX dead_letters_once_per_event
    ON dead_letters (worker, event_id) WHERE event_id IS NOT NULL;
CREATE UNIQUE INDEX dead_letters_once_per_sequence
    ON dead_letters (worker, sequence) WHERE event_id IS NULL;
CREATE INDEX dead_letters_of_event ON dead_letters (event_id);
