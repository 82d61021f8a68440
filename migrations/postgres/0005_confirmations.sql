-- Sign-ups that were let past and of which it is to be found out whether an account came to be, and
-- the accounts that platforms were about to issue tokens to.

CREATE TABLE confirmations (
    event_id       uuid PRIMARY KEY,       -- the accepted or approved event
    person         text NOT NULL,
    connector      text NOT NULL,
    state          text NOT NULL
        CHECK (state IN ('waiting', 'confirmed', 'abandoned', 'superseded')),
    since          timestamptz NOT NULL,   -- when the event happened
    due_at         timestamptz NOT NULL,   -- or, while a process has it in hand, until when it may
    tries          bigint NOT NULL,        -- how often the account was looked for and not there
    object_id      text,                   -- the account, once it is confirmed
    source         text CHECK (source IN ('token', 'directory', 'account')),
    decided_at     timestamptz,
    decision_event uuid,
    event          bytea                   -- the accepted or approved event, whole, while it waits
        CHECK ((state = 'waiting') = (event IS NOT NULL))
);
-- Of several sign-ups of a person only the newest waits: there is one account.
CREATE UNIQUE INDEX confirmations_waiting
    ON confirmations (person, connector) WHERE state = 'waiting';
CREATE INDEX confirmations_due ON confirmations (due_at) WHERE state = 'waiting';
CREATE INDEX confirmations_of_person ON confirmations (person, event_id);

CREATE TABLE account_sightings (
    person    text NOT NULL,
    connector text NOT NULL,
    object_id text NOT NULL,
    seen_at   timestamptz NOT NULL,
    PRIMARY KEY (person, connector)
);
CREATE INDEX account_sightings_seen ON account_sightings (seen_at);
