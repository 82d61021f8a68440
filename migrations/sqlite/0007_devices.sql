-- Devices that people registered for push notifications. A device that is removed keeps its row,
-- with the reason, and loses what could reach it.

CREATE TABLE devices (
    id             BLOB PRIMARY KEY,       -- a UUIDv7
    person         TEXT NOT NULL,          -- the pseudonym
    kind           TEXT NOT NULL CHECK (kind IN ('web-push', 'fcm', 'apns')),
    address        TEXT,                   -- the endpoint or the token, a secret; NULL once removed
    public_key     TEXT,                   -- web-push: the browser's key
    auth           TEXT,                   -- web-push: the browser's secret
    label          TEXT,
    created_at     TEXT NOT NULL,
    registered_at  TEXT NOT NULL,          -- the last time
    last_used_at   TEXT,
    removed_at     TEXT,
    removed_reason TEXT
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX devices_once ON devices (kind, address) WHERE removed_at IS NULL;
CREATE INDEX devices_of_person ON devices (person, id);
