-- What a worker claims before it has a thread for it.
-- oldest client: 1

-- Whether the latest lease is of that kind: should it run out, the command had not started, and nothing is charged.
ALTER TABLE commandbus.command ADD COLUMN ahead boolean NOT NULL DEFAULT false;
