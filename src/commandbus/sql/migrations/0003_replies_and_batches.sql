-- Where the outcome of a command goes: to a domain or a waiting process (reply_to), and into the counts of its batch.
-- oldest client: 1

ALTER TABLE commandbus.command ADD COLUMN batch_id uuid;
ALTER TABLE commandbus.command_history ADD COLUMN batch_id uuid;

-- Commands that are counted together. What is neither completed, failed, canceled nor parked is still to come.
CREATE TABLE commandbus.batch (
    domain      text COLLATE "C" NOT NULL,
    batch_id    uuid NOT NULL,
    name        text,
    total       integer NOT NULL DEFAULT 0,
    completed   integer NOT NULL DEFAULT 0,
    failed      integer NOT NULL DEFAULT 0,
    canceled    integer NOT NULL DEFAULT 0,
    parked      integer NOT NULL DEFAULT 0,
    growing     boolean NOT NULL DEFAULT true,  -- more may be added: it cannot finish yet
    on_complete jsonb,                          -- a row of command: what is sent when it finishes
    hash        text,                           -- of what it was created with, under an id of the caller's
    created_at  timestamptz NOT NULL,
    finished_at timestamptz,
    PRIMARY KEY (domain, batch_id),
    CONSTRAINT batch_bounds CHECK (length(domain) BETWEEN 1 AND 128 AND length(name) BETWEEN 1 AND 256),
    CONSTRAINT batch_counts CHECK (
        least(completed, failed, canceled, parked) >= 0 AND completed + failed + canceled + parked <= total
        AND (finished_at IS NULL OR NOT growing AND completed + failed + canceled = total))
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 1000);
CREATE INDEX batch_newest ON commandbus.batch (domain, created_at, batch_id);

-- Changes of counts that are not in the row yet: commands that were added, and what ended while a transaction of
-- somebody else's kept the row. Whoever counts next puts them in.
CREATE TABLE commandbus.batch_change (
    domain    text COLLATE "C" NOT NULL,
    batch_id  uuid NOT NULL,
    total     integer NOT NULL DEFAULT 0,
    completed integer NOT NULL DEFAULT 0,
    failed    integer NOT NULL DEFAULT 0,
    canceled  integer NOT NULL DEFAULT 0,
    parked    integer NOT NULL DEFAULT 0
) WITH (autovacuum_vacuum_threshold = 1000);
CREATE INDEX batch_change_id ON commandbus.batch_change (domain, batch_id);

-- Which commands, in the order in which they were given. A table of its own, since an index on the history would have
-- to be built while everything waits, and be kept up for every command that ends.
CREATE TABLE commandbus.batch_command (
    domain     text COLLATE "C" NOT NULL,
    batch_id   uuid NOT NULL,
    position   bigint NOT NULL,
    command_id uuid NOT NULL,
    PRIMARY KEY (domain, batch_id, position)
);
