-- Tables of commandbus. They are private: programs call the functions and read the views.
-- oldest client: 1

CREATE TABLE commandbus.migration (
    version       integer PRIMARY KEY,
    name          text NOT NULL,
    oldest_client integer NOT NULL,
    applied_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- What the owner of the database decides.
CREATE TABLE commandbus.setting (
    name  text PRIMARY KEY,
    value text NOT NULL,
    CONSTRAINT setting_retention CHECK (name <> 'retention' OR value::interval >= interval '1 day')
);
INSERT INTO commandbus.setting (name, value) VALUES
    ('retention', '30 days'),    -- how long a finished command is kept at least; dedupe lasts as long
    ('test_clock', 'off');       -- 'on' lets a session shift its clock by commandbus.clock_offset

-- CACHE 1: a session that hoards numbers would send behind the places that workers remember.
CREATE SEQUENCE commandbus.command_seq AS bigint CACHE 1;

-- The unfinished commands. Small and hot: a claim changes no indexed column, so it is a HOT update
-- (fillfactor 50 leaves it room). 16,500-17,700 commands/s and 634 B of WAL each, where one table with an
-- indexed status did 11,000-14,100 and 1,023 B.
--
-- A row that waits is in exactly one of four lines, each with its own partial index:
--   place        the queue: priority and sequence number in one number, see commandbus._place
--   due_at       SCHEDULED: not before this moment
--   alone_since  crashed twice: waits to be run alone
--   parked_at    the troubleshooting queue
-- While it is leased it keeps its place (or alone_since): taking it out would be an indexed change.
CREATE TABLE commandbus.command (
    domain         text COLLATE "C" NOT NULL,
    command_id     uuid NOT NULL,
    command_type   text COLLATE "C" NOT NULL,
    status         text COLLATE "C" NOT NULL,
    place          bigint,
    due_at         timestamptz,
    alone_since    timestamptz,
    parked_at      timestamptz,
    priority       smallint NOT NULL DEFAULT 0,
    max_attempts   integer,
    attempts       integer NOT NULL DEFAULT 0,
    crashes        integer NOT NULL DEFAULT 0,
    events         integer NOT NULL DEFAULT 0,
    delivery       bigint NOT NULL DEFAULT 0,
    lease_token    uuid,           -- this and the next three: the latest lease, kept after it ended
    lease_until    timestamptz,
    claimed_at     timestamptz,
    worker         text,
    sent_at        timestamptz NOT NULL,
    not_before     timestamptz,
    correlation_id text,
    reply_to       text,
    data_hash      bytea NOT NULL, -- of type and data as first sent; an edit does not change it
    data           jsonb NOT NULL,
    headers        jsonb NOT NULL,
    error          jsonb,          -- of the latest attempt or crash
    PRIMARY KEY (domain, command_id),
    CONSTRAINT command_bounds CHECK (
        length(domain) BETWEEN 1 AND 128 AND length(command_type) BETWEEN 1 AND 128
        AND priority BETWEEN -100 AND 100 AND max_attempts >= 1),
    CONSTRAINT command_in_one_line CHECK (CASE status
        WHEN 'PENDING' THEN num_nonnulls(place, alone_since) = 1 AND num_nonnulls(due_at, parked_at) = 0
        WHEN 'IN_PROGRESS' THEN num_nonnulls(place, alone_since) = 1 AND num_nonnulls(due_at, parked_at) = 0
            AND num_nonnulls(lease_token, lease_until, claimed_at, worker) = 4
        WHEN 'SCHEDULED' THEN due_at IS NOT NULL AND num_nonnulls(place, alone_since, parked_at) = 0
        WHEN 'IN_TROUBLESHOOTING_QUEUE' THEN
            parked_at IS NOT NULL AND num_nonnulls(place, alone_since, due_at) = 0
        ELSE false END)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

CREATE INDEX command_queue ON commandbus.command (domain, command_type, place) WHERE place IS NOT NULL;
CREATE INDEX command_due ON commandbus.command (domain, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX command_alone ON commandbus.command (domain, alone_since) WHERE alone_since IS NOT NULL;
CREATE INDEX command_parked ON commandbus.command (domain, parked_at, command_id) WHERE parked_at IS NOT NULL;

-- A place at or above the highest ever claimed, per type and priority: the bound of the search for expired
-- leases. It runs ahead by a few thousand, so that it is written once in as many claims.
CREATE TABLE commandbus.claim_mark (
    domain       text COLLATE "C" NOT NULL,
    command_type text COLLATE "C" NOT NULL,
    level        integer NOT NULL,
    place        bigint NOT NULL,
    PRIMARY KEY (domain, command_type, level)
);

-- What a command's own row cannot say: failed attempts, crashes, releases, operators' actions.
CREATE TABLE commandbus.audit_event (
    domain          text COLLATE "C" NOT NULL,
    command_id      uuid NOT NULL,
    event_no        integer NOT NULL,
    event           text NOT NULL,
    occurred_at     timestamptz NOT NULL,
    from_status     text NOT NULL,
    to_status       text NOT NULL,
    delivery        bigint NOT NULL,
    attempt         integer,       -- the number of the attempt that this verdict ended
    worker          text,
    claimed_at      timestamptz,
    lease_token     uuid,          -- the lease that the command bore
    presented_token uuid,          -- the lease that the caller presented
    operator        text,
    reason          text,
    error           jsonb,
    details         jsonb,
    PRIMARY KEY (domain, command_id, event_no)
);

-- The finished commands and their events, by week of finishing; retention drops whole weeks.
CREATE TABLE commandbus.command_history (
    domain          text COLLATE "C" NOT NULL,
    command_id      uuid NOT NULL,
    command_type    text COLLATE "C" NOT NULL,
    status          text COLLATE "C" NOT NULL,
    priority        smallint NOT NULL,
    max_attempts    integer,
    attempts        integer NOT NULL,
    crashes         integer NOT NULL,
    events          integer NOT NULL,
    delivery        bigint NOT NULL,
    lease_token     uuid,
    lease_until     timestamptz,
    claimed_at      timestamptz,
    worker          text,
    presented_token uuid,          -- of the worker that finished it; null: an operator or the application did
    sent_at         timestamptz NOT NULL,
    not_before      timestamptz,
    finished_at     timestamptz NOT NULL,
    correlation_id  text,
    reply_to        text,
    data_hash       bytea NOT NULL,
    data            jsonb NOT NULL,
    headers         jsonb NOT NULL,
    result          jsonb,
    error           jsonb,
    CONSTRAINT command_history_terminal CHECK (status IN ('COMPLETED', 'FAILED', 'CANCELED'))
) PARTITION BY RANGE (finished_at);
CREATE INDEX command_history_id ON commandbus.command_history (domain, command_id);

CREATE TABLE commandbus.audit_history (
    LIKE commandbus.audit_event,
    finished_at timestamptz NOT NULL
) PARTITION BY RANGE (finished_at);
CREATE INDEX audit_history_id ON commandbus.audit_history (domain, command_id);
