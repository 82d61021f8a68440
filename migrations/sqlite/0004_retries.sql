-- What waits for a worker outside the log: events whose last attempt failed, and dead letters that
-- were sent back. And what became of each dead letter, and which workers were told to pause.
-- What is compared (due_at) is written to the microsecond, so that its text sorts as the time does.

CREATE TABLE retries (
    worker        TEXT NOT NULL,
    event_id      BLOB NOT NULL,
    person        TEXT NOT NULL,
    sequence      INTEGER NOT NULL,
    event         BLOB NOT NULL,           -- as it stood in the log
    due_at        TEXT NOT NULL,           -- or, while a process has it in hand, until when it may
    tries         INTEGER NOT NULL,        -- failed attempts that count, since it came here
    failing_since TEXT,                    -- the first of them; NULL before it
    PRIMARY KEY (worker, event_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX retries_due ON retries (worker, due_at);

ALTER TABLE dead_letters ADD COLUMN state TEXT NOT NULL DEFAULT 'parked'
    CHECK (state IN ('parked', 'retrying', 'delivered', 'dropped'));
ALTER TABLE dead_letters ADD COLUMN changed_at TEXT; -- when it got its state; NULL: when it was parked
-- Holds all that counting and grouping ask for.
CREATE INDEX dead_letters_in_state ON dead_letters (state, worker, cause_class, id, parked_at);
CREATE INDEX dead_letters_of_person ON dead_letters (person);
-- A log that was made anew counts from the start: other bytes may stand where those of before did.
DROP INDEX dead_letters_once_per_sequence;
CREATE UNIQUE INDEX dead_letters_once_per_content
    ON dead_letters (worker, sequence, payload) WHERE event_id IS NULL;

-- Each thing that happened to a dead letter, the first parking included; nothing is ever removed.
CREATE TABLE dead_letter_history (
    id          INTEGER PRIMARY KEY,
    letter_id   INTEGER NOT NULL REFERENCES dead_letters (id),
    at          TEXT NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('parked', 'retrying', 'delivered', 'dropped')),
    cause_class TEXT,                      -- where it was parked
    error       TEXT,
    actor       TEXT,                      -- who retried or dropped it
    reason      TEXT
) STRICT;
CREATE INDEX dead_letter_history_of_letter ON dead_letter_history (letter_id, id);
INSERT INTO dead_letter_history (letter_id, at, state, cause_class, error)
    SELECT id, parked_at, 'parked', cause_class, error FROM dead_letters;

CREATE TABLE paused_workers (
    worker    TEXT PRIMARY KEY,
    paused_at TEXT NOT NULL,
    paused_by TEXT NOT NULL,
    reason    TEXT NOT NULL
) STRICT, WITHOUT ROWID;
