-- Accounts made for approved sign-ups: one row for each approved event, written before the
-- directory is asked, so that whoever comes after a crash knows what may have happened.

CREATE TABLE accounts (
    event_id      BLOB PRIMARY KEY,        -- the approved event
    person        TEXT NOT NULL,
    worker        TEXT NOT NULL,
    tries         INTEGER NOT NULL,        -- how often making it was begun
    begun_at      TEXT NOT NULL,           -- for the first time
    tried_at      TEXT NOT NULL,           -- for the last time
    origin        TEXT CHECK (origin IN ('created', 'invited', 'found')),
    object_id     TEXT,                    -- the directory's id; NULL until it is known
    invitation_id TEXT,
    made_at       TEXT,                    -- when its id became known
    finished_at   TEXT                     -- NULL while something is left to do
) STRICT, WITHOUT ROWID;
CREATE INDEX accounts_of_person ON accounts (person, event_id);
