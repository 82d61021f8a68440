-- Accounts made for approved sign-ups: one row for each approved event, written before the
-- directory is asked, so that whoever comes after a crash knows what may have happened.

CREATE TABLE accounts (
    event_id      uuid PRIMARY KEY,        -- the approved event
    person        text NOT NULL,
    worker        text NOT NULL,
    tries         bigint NOT NULL,         -- how often making it was begun
    begun_at      timestamptz NOT NULL,    -- for the first time
    tried_at      timestamptz NOT NULL,    -- for the last time
    origin        text CHECK (origin IN ('created', 'invited', 'found')),
    object_id     text,                    -- the directory's id; NULL until it is known
    invitation_id text,
    made_at       timestamptz,             -- when its id became known
    finished_at   timestamptz              -- NULL while something is left to do
);
CREATE INDEX accounts_of_person ON accounts (person, event_id);
