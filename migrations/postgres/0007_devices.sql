-- Devices that people registered for push notifications. A device that is removed keeps its row,
-- with the reason, and loses what could reach it.

CREATE TABLE devices (
    id             uuid PRIMARY KEY,       -- a UUIDv7
    person         text NOT NULL,          -- the pseudonym
    kind           text NOT NULL CHECK (kind IN ('web-push', 'fcm', 'apns')),
    address        text,                   -- the endpoint or the token, a secret; NULL once removed
    public_key     text,                   -- web-push: the browser's key
    auth           text,                   -- web-push: the browser's secret
    label          text,
    created_at     timestamptz NOT NULL,
    registered_at  timestamptz NOT NULL,   -- the last time
    last_used_at   timestamptz,
    removed_at     timestamptz,
    removed_reason text
);
CREATE UNIQUE INDEX devices_once ON devices (kind, address) WHERE removed_at IS NULL;
CREATE INDEX devices_of_person ON devices (person, id);
