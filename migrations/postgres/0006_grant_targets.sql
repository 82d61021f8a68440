-- What each target is to hold of a granted role, and what it was last made to hold. Written together
-- with the grant; whoever finds a row pending makes the target so and notes it, and so whatever
-- stops in between is taken up again.

CREATE TABLE grant_targets (
    person       text NOT NULL,
    role         text NOT NULL,
    target       text NOT NULL,            -- as the configuration names it
    wanted       text NOT NULL CHECK (wanted IN ('present', 'absent')),
    state        text NOT NULL CHECK (state IN ('pending', 'applied')),
    version      bigint NOT NULL,          -- grows whenever what is wanted changes
    event_id     uuid NOT NULL,            -- the event that the grant stems from
    email        text,                     -- how a target knows the person
    object_id    text,                     -- the directory's id of the account, where it is known
    account      text,                     -- the target's own id of the account, once it was seen
    membership   text,                     -- the target's id of what was made, where it has one
    expires_at   timestamptz,
    since        timestamptz NOT NULL,     -- when what is wanted changed last
    due_at       timestamptz,              -- when to try (again); NULL while an event carries it
    leased_until timestamptz,              -- somebody has it in hand
    tries        bigint NOT NULL,          -- failed ones, since then
    error        text,                     -- of the last of them
    applied_at   timestamptz,              -- when it was last made so
    PRIMARY KEY (person, role, target)
);
CREATE INDEX grant_targets_due
    ON grant_targets (target, due_at) WHERE state = 'pending' AND due_at IS NOT NULL;
CREATE INDEX grant_targets_pending ON grant_targets (person) WHERE state = 'pending';
CREATE INDEX grant_targets_to_expire
    ON grant_targets (expires_at) WHERE wanted = 'present' AND expires_at IS NOT NULL;

-- A role that several sign-ups earned is held by the newest of them, in `grants`; here are the others.
-- Where that one comes to nothing, the newest of these holds it again.
CREATE TABLE older_grants (
    person     text NOT NULL,
    role       text NOT NULL,
    event_id   uuid NOT NULL,
    reason     text NOT NULL,
    granted_at timestamptz NOT NULL,
    expires_at timestamptz,
    PRIMARY KEY (person, role, event_id)
);

ALTER TABLE grants ADD COLUMN revoked_by text;
ALTER TABLE grants ADD COLUMN revoke_reason text;
ALTER TABLE grants ADD COLUMN barred_until timestamptz;  -- somebody revoked it: nothing of before earns it
