-- What operators need: who works, and how large the data of a command may be.
-- oldest client: 1

-- A row for each running worker and domain, for people who ask why a command waits. Nothing else depends on it.
CREATE TABLE commandbus.worker (
    domain        text COLLATE "C" NOT NULL,
    worker        text COLLATE "C" NOT NULL,
    command_types text[] NOT NULL,
    concurrency   integer NOT NULL,
    started_at    timestamptz NOT NULL,
    seen_at       timestamptz NOT NULL,
    PRIMARY KEY (domain, worker)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 1000);

INSERT INTO commandbus.setting (name, value) VALUES
    ('max_data_bytes', '262144');  -- of the data of one command, as JSON text; 1 KiB to 1 MiB
ALTER TABLE commandbus.setting ADD CONSTRAINT setting_max_data_bytes
    CHECK (name <> 'max_data_bytes' OR value::integer BETWEEN 1024 AND 1048576);
