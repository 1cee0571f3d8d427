-- Processes: commands that follow each other as a class says, and are undone in reverse when they cannot be ended.
-- oldest client: 1

-- fillfactor: each reply writes the row, and no index names what it changes.
CREATE TABLE commandbus.process (
    domain        text COLLATE "C" NOT NULL,
    process_id    uuid NOT NULL,
    process_type  text COLLATE "C" NOT NULL,
    status        text COLLATE "C" NOT NULL,
    revision      integer NOT NULL DEFAULT 0,  -- how many outcomes were applied
    steps         integer NOT NULL DEFAULT 0,  -- how many commands it has sent
    state         jsonb NOT NULL,
    state_version integer NOT NULL,
    result        jsonb,                       -- of Finish: it ends as soon as no step is open
    error         jsonb,                       -- the first: why it is compensated
    data_hash     bytea NOT NULL,              -- of type and state as first given
    deadline      timestamptz,
    started_at    timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    finished_at   timestamptz,
    PRIMARY KEY (domain, process_id),
    CONSTRAINT process_status CHECK (CASE status
        WHEN 'RUNNING' THEN num_nonnulls(error, finished_at) = 0
        WHEN 'COMPENSATING' THEN error IS NOT NULL AND num_nonnulls(result, finished_at) = 0
        WHEN 'COMPLETED' THEN num_nonnulls(result, finished_at) = 2 AND error IS NULL
        WHEN 'COMPENSATED' THEN num_nonnulls(error, finished_at) = 2 AND result IS NULL
        WHEN 'FAILED' THEN num_nonnulls(error, finished_at) = 2 AND result IS NULL
        ELSE false END)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX process_finished ON commandbus.process (finished_at) WHERE finished_at IS NOT NULL;

-- A row for each command that a process has sent, under the id of that command. OPEN until its outcome is applied.
CREATE TABLE commandbus.process_step (
    domain         text COLLATE "C" NOT NULL,  -- of the process
    command_id     uuid NOT NULL,
    process_id     uuid NOT NULL,
    number         integer NOT NULL,
    kind           text COLLATE "C" NOT NULL,
    name           text COLLATE "C" NOT NULL,
    of_number      integer,                    -- of an undo: what it undoes; of a deadline: whose, null for the process
    command_domain text COLLATE "C" NOT NULL,
    status         text COLLATE "C" NOT NULL DEFAULT 'OPEN',
    applied        integer,                    -- the revision that its outcome made: the order of completion
    expired        boolean NOT NULL DEFAULT false,
    undo           jsonb,                      -- the command that undoes it, as send_v1 takes it; null: nothing to undo
    undo_begun     boolean NOT NULL DEFAULT false,
    error          jsonb,
    sent_at        timestamptz NOT NULL,
    ended_at       timestamptz,
    PRIMARY KEY (domain, command_id),
    CONSTRAINT process_step_kind CHECK (kind IN ('step', 'undo', 'wait', 'deadline')),
    CONSTRAINT process_step_status CHECK (CASE status
        WHEN 'OPEN' THEN num_nonnulls(applied, ended_at) = 0
        ELSE status IN ('COMPLETED', 'FAILED', 'CANCELED') AND ended_at IS NOT NULL END)
) WITH (fillfactor = 70);
CREATE INDEX process_step_process ON commandbus.process_step (domain, process_id, number);
