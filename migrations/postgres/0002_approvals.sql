-- Requests for approval, and the outbox: events that were decided here and still go to the log.
-- Events are kept as the bytes that go to the log: jsonb would change them.

CREATE TABLE approval_requests (
    id             uuid PRIMARY KEY,         -- the pending event that opened it
    person         text NOT NULL,
    connector      text NOT NULL,
    state          text NOT NULL CHECK (state IN ('pending', 'approved', 'denied', 'expired')),
    attempts       bigint NOT NULL,          -- always the number of rows in approval_attempts
    requested_at   timestamptz NOT NULL,     -- when the opening event happened
    opened_at      timestamptz NOT NULL,
    expires_at     timestamptz NOT NULL,
    decided_at     timestamptz,              -- or expired
    decided_by     text,
    reason         text,
    decision_event uuid,
    event          bytea NOT NULL            -- the opening event, whole
);
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
    event_id   uuid PRIMARY KEY,
    request_id uuid NOT NULL REFERENCES approval_requests (id),
    noted_at   timestamptz NOT NULL
);
CREATE INDEX approval_attempts_of_request ON approval_attempts (request_id);

CREATE TABLE outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id   uuid NOT NULL UNIQUE,
    event      bytea NOT NULL,
    written_at timestamptz NOT NULL
);
