-- Sign-ups that were let past and of which it is to be found out whether an account came to be, and
-- the accounts that platforms were about to issue tokens to.
-- What is compared (due_at, seen_at) is written to the microsecond, so that its text sorts as the
-- time does.

CREATE TABLE confirmations (
    event_id       BLOB PRIMARY KEY,       -- the accepted or approved event
    person         TEXT NOT NULL,
    connector      TEXT NOT NULL,
    state          TEXT NOT NULL
        CHECK (state IN ('waiting', 'confirmed', 'abandoned', 'superseded')),
    since          TEXT NOT NULL,          -- when the event happened
    due_at         TEXT NOT NULL,          -- or, while a process has it in hand, until when it may
    tries          INTEGER NOT NULL,       -- how often the account was looked for and not there
    object_id      TEXT,                   -- the account, once it is confirmed
    source         TEXT CHECK (source IN ('token', 'directory', 'account')),
    decided_at     TEXT,
    decision_event BLOB,
    event          BLOB                    -- the accepted or approved event, whole, while it waits
        CHECK ((state = 'waiting') = (event IS NOT NULL))
) STRICT, WITHOUT ROWID;
-- Of several sign-ups of a person only the newest waits: there is one account.
CREATE UNIQUE INDEX confirmations_waiting
    ON confirmations (person, connector) WHERE state = 'waiting';
CREATE INDEX confirmations_due ON confirmations (due_at) WHERE state = 'waiting';
CREATE INDEX confirmations_of_person ON confirmations (person, event_id);

CREATE TABLE account_sightings (
    person    TEXT NOT NULL,
    connector TEXT NOT NULL,
    object_id TEXT NOT NULL,
    seen_at   TEXT NOT NULL,
    PRIMARY KEY (person, connector)
) STRICT, WITHOUT ROWID;
CREATE INDEX account_sightings_seen ON account_sightings (seen_at);
