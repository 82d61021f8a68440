-- The business data. Events are immutable and live in the log; here is what was made of them.
-- Ids of events are UUIDv7, so that they sort by time.

CREATE TABLE people (
    person      text PRIMARY KEY,          -- the pseudonym
    email       text,
    claims      jsonb NOT NULL,            -- with what the decision changed
    status      text NOT NULL,             -- the kind of the newest event
    first_event uuid NOT NULL,
    last_event  uuid NOT NULL,             -- an older event than this changes nothing but the counter
    changes     bigint NOT NULL,           -- always the number of rows in person_changes
    created_at  timestamptz NOT NULL,
    updated_at  timestamptz NOT NULL
);

CREATE TABLE sign_ups (
    event_id       uuid PRIMARY KEY,
    person         text NOT NULL REFERENCES people (person) DEFERRABLE INITIALLY DEFERRED,
    connector      text NOT NULL,
    step           text NOT NULL,
    kind           text NOT NULL,
    client         text,
    locale         text,
    identities     jsonb NOT NULL,
    claims         jsonb NOT NULL,         -- as the platform sent them
    changed_claims jsonb NOT NULL,         -- what the decision changed
    occurred_at    timestamptz NOT NULL,
    recorded_at    timestamptz NOT NULL
);
CREATE INDEX sign_ups_of_person ON sign_ups (person, event_id);

-- Without uniqueness on purpose: a second row for an event is the proof that an effect happened
-- twice. What prevents it are the keys of sign_ups and inbox.
CREATE TABLE person_changes (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id   uuid NOT NULL REFERENCES sign_ups (event_id),
    person     text NOT NULL,
    applied    boolean NOT NULL,           -- false: a newer event was there already, so only counted
    changed_at timestamptz NOT NULL
);
CREATE INDEX person_changes_of_event ON person_changes (event_id);

CREATE TABLE grants (
    person     text NOT NULL,
    role       text NOT NULL,
    reason     text NOT NULL,              -- the rule
    event_id   uuid NOT NULL,
    granted_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    PRIMARY KEY (person, role)
);

-- One row for each time a set of roles, possibly empty, was granted; a proof like person_changes.
CREATE TABLE grant_sets (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id   uuid NOT NULL,
    worker     text NOT NULL,
    person     text NOT NULL,
    roles      bigint NOT NULL,
    granted_at timestamptz NOT NULL
);
CREATE INDEX grant_sets_of_event ON grant_sets (event_id);

CREATE TABLE notifications (
    event_id        uuid NOT NULL,
    worker          text NOT NULL,
    channel         text NOT NULL,
    person          text NOT NULL,
    state           text NOT NULL CHECK (state IN ('sending', 'sent', 'recorded')),
    idempotency_key text NOT NULL,
    subject         text,
    body            text,
    provider_id     text,
    tries           bigint NOT NULL,
    begun_at        timestamptz NOT NULL,
    finished_at     timestamptz,
    PRIMARY KEY (event_id, worker, channel)
);

CREATE TABLE inbox (
    worker   text NOT NULL,
    event_id uuid NOT NULL,
    done_at  timestamptz NOT NULL,
    PRIMARY KEY (worker, event_id)
);

CREATE TABLE attempts (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker      text NOT NULL,
    event_id    uuid NOT NULL,
    sequence    bigint NOT NULL,
    started_at  timestamptz NOT NULL,
    took_ms     bigint NOT NULL,
    cause_class text NOT NULL,
    error       text NOT NULL
);
CREATE INDEX attempts_at_event ON attempts (event_id, worker, id);

CREATE TABLE dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker      text NOT NULL,
    event_id    uuid,                      -- NULL where the bytes are not an event
    person      text,
    sequence    bigint NOT NULL,
    payload     bytea NOT NULL,
    cause_class text NOT NULL,
    error       text NOT NULL,
    parked_at   timestamptz NOT NULL
);
CREATE UNIQUE INDEX dead_letters_once_per_event
    ON dead_letters (worker, event_id) WHERE event_id IS NOT NULL;
CREATE UNIQUE INDEX dead_letters_once_per_sequence
    ON dead_letters (worker, sequence) WHERE event_id IS NULL;
CREATE INDEX dead_letters_of_event ON dead_letters (event_id);
