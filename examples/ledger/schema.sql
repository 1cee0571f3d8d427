-- The ledger's own tables. The command bus knows nothing of them.
--
-- There is deliberately no unique constraint on entry.transfer_id, and no check that a balance stays above zero. Either
-- would be a good belt in a real ledger; here it would hide a transfer that the bus runs twice. The handler's writes
-- commit together with the completion of their command, and proof.py shows that this is enough.

CREATE SCHEMA IF NOT EXISTS ledger;

CREATE TABLE IF NOT EXISTS ledger.account (
    account_id    text PRIMARY KEY,
    opening_cents bigint NOT NULL,
    balance_cents bigint NOT NULL
);

CREATE TABLE IF NOT EXISTS ledger.entry (
    entry_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    transfer_id text NOT NULL,
    account_id  text NOT NULL REFERENCES ledger.account,
    cents       bigint NOT NULL,  -- below zero: taken from the account
    booked_at   timestamptz NOT NULL DEFAULT now()
);
