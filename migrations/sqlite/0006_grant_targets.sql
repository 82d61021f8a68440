-- What each target is to hold of a granted role, and what it was last made to hold. Written together
-- with the grant; whoever finds a row pending makes the target so and notes it, and so whatever
-- stops in between is taken up again.
-- What is compared (due_at, leased_until, expires_at) is written to the microsecond, so that its
-- text sorts as the time does.

CREATE TABLE grant_targets (
    person       TEXT NOT NULL,
    role         TEXT NOT NULL,
    target       TEXT NOT NULL,            -- as the configuration names it
    wanted       TEXT NOT NULL CHECK (wanted IN ('present', 'absent')),
    state        TEXT NOT NULL CHECK (state IN ('pending', 'applied')),
    version      INTEGER NOT NULL,         -- grows whenever what is wanted changes
    event_id     BLOB NOT NULL,            -- the event that the grant stems from
    email        TEXT,                     -- how a target knows the person
    object_id    TEXT,                     -- the directory's id of the account, where it is known
    account      TEXT,                     -- the target's own id of the account, once it was seen
    membership   TEXT,                     -- the target's id of what was made, where it has one
    expires_at   TEXT,
    since        TEXT NOT NULL,            -- when what is wanted changed last
    due_at       TEXT,                     -- when to try (again); NULL while an event carries it
    leased_until TEXT,                     -- somebody has it in hand
    tries        INTEGER NOT NULL,         -- failed ones, since then
    error        TEXT,                     -- of the last of them
    applied_at   TEXT,                     -- when it was last made so
    PRIMARY KEY (person, role, target)
) STRICT, WITHOUT ROWID;
CREATE INDEX grant_targets_due
    ON grant_targets (target, due_at) WHERE state = 'pending' AND due_at IS NOT NULL;
CREATE INDEX grant_targets_pending ON grant_targets (person) WHERE state = 'pending';
CREATE INDEX grant_targets_to_expire
    ON grant_targets (expires_at) WHERE wanted = 'present' AND expires_at IS NOT NULL;

-- A role that several sign-ups earned is held by the newest of them, in `grants`; here are the others.
-- Where that one comes to nothing, the newest of these holds it again.
CREATE TABLE older_grants (
    person     TEXT NOT NULL,
    role       TEXT NOT NULL,
    event_id   BLOB NOT NULL,
    reason     TEXT NOT NULL,
    granted_at TEXT NOT NULL,
    expires_at TEXT,
    PRIMARY KEY (person, role, event_id)
) STRICT, WITHOUT ROWID;

ALTER TABLE grants ADD COLUMN revoked_by TEXT;
ALTER TABLE grants ADD COLUMN revoke_reason TEXT;
ALTER TABLE grants ADD COLUMN barred_until TEXT;  -- somebody revoked it: nothing of before earns it
