-- Batches whose retention is over are found by when they finished.
-- oldest client: 1

CREATE INDEX batch_finished ON commandbus.batch (finished_at) WHERE finished_at IS NOT NULL;
