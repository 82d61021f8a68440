-- Requests for approval, and the outbox: events that were decided here and still go to the log.
-- Events are kept as the bytes that go to the log.

CREATE TABLE approval_requests (
    id             BLOB PRIMARY KEY,         -- the pending event that opened it
    person         TEXT NOT NULL,
    connector      TEXT NOT NULL,
    state          TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'denied', 'expired')),
    attempts       INTEGER NOT NULL,         -- always the number of rows in approval_attempts
    requested_at   TEXT NOT NULL,            -- when the opening event happened
    opened_at      TEXT NOT NULL,
    expires_at     TEXT NOT NULL,
    decided_at     TEXT,                     -- or expired
    decided_by     TEXT,
    reason         TEXT,
    decision_event BLOB,
    event          BLOB NOT NULL             -- the opening event, whole
) STRICT;
-- One open request for each person: this is what settles it between two workers.
CREATE UNIQUE INDEX approval_requests_open
    ON approval_requests (person, connector) WHERE state = 'pending';
CREATE INDEX approval_requests_of_person ON approval_requests (person, connector, id);
CREATE INDEX approval_requests_of_connector ON approval_requests (connector, id);
CREATE INDEX approval_requests_in_state ON approval_requests (state, id);
CREATE INDEX approval_requests_to_expire
    ON approval_requests (expires_at, id) WHERE state = 'pending';

-- Every pending event that belongs to a request, the opening one included.
CREATE TABLE approval_attempts (
    event_id   BLOB PRIMARY KEY,
    request_id BLOB NOT NULL REFERENCES approval_requests (id),
    noted_at   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX approval_attempts_of_request ON approval_attempts (request_id);

CREATE TABLE outbox (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id   BLOB NOT NULL UNIQUE,
    event      BLOB NOT NULL,
    written_at TEXT NOT NULL
) STRICT;
