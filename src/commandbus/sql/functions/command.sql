-- The life of a command. This folder is the only place where one changes its state.
--
--   (sent) --a--> PENDING        a  send            n  release: stopped before the handler ended
--   (sent) --b--> SCHEDULED      b  send with delay  c  crash: the lease ran out; at the second it runs alone
--   SCHEDULED --p--> PENDING     p  promoted when due, by a claim
--   PENDING --l--> IN_PROGRESS   l  claim: delivery + 1, a new lease token
--   IN_PROGRESS --n,c,e--> PENDING               e  expired: the lease ran out of what a worker had not started
--   IN_PROGRESS --r--> SCHEDULED                 r  fail, transient: back-off
--   IN_PROGRESS --k--> IN_TROUBLESHOOTING_QUEUE  k  fail, permanent or out of attempts; or the third crash
--   IN_PROGRESS --d--> COMPLETED                 d  complete
--   IN_PROGRESS --f--> FAILED                    f  fail, business rule
--   IN_TROUBLESHOOTING_QUEUE --R--> PENDING      R  operator retry, perhaps with edited data
--   IN_TROUBLESHOOTING_QUEUE --D--> COMPLETED    D  operator complete
--   IN_TROUBLESHOOTING_QUEUE --x--> CANCELED     x  operator cancel
--   any unfinished --x--> CANCELED               x  cancel; a running one loses its lease
--
-- Every write of a delivery passes the fence, commandbus._hold. Every ending passes commandbus._finish.
-- Locks, in order: commands by id, audit rows, history, claim marks by type and level. Time is the
-- server's, commandbus.clock(). Names end in _vN and never change meaning; a leading _ is internal.

-- clock: the moment that all transitions use. clock_timestamp(), not now(): that stands still in a transaction.
-- from -> to: none. Locks: none.
-- Raises CB004 when the session shifts a clock that the owner of the database has not opened.
CREATE OR REPLACE FUNCTION commandbus.clock() RETURNS timestamptz
LANGUAGE plpgsql AS $$
DECLARE
    v_offset text := current_setting('commandbus.clock_offset', true);
BEGIN
    IF v_offset IS NULL OR v_offset = '' THEN
        RETURN clock_timestamp();
    END IF;
    IF NOT EXISTS (SELECT FROM commandbus.setting s WHERE s.name = 'test_clock' AND s.value = 'on') THEN
        RAISE EXCEPTION 'commandbus.clock_offset is set, but this database has no test clock'
            USING ERRCODE = 'CB004', HINT = 'Reset commandbus.clock_offset; only a test database opens its clock.';
    END IF;
    RETURN clock_timestamp() + v_offset::interval;
END $$;

-- _place: a new place at the end of the line of this priority. Smaller comes first.
-- place = (100 - priority) * 2^54 + sequence number: one number is one range of the index, whatever the mix
-- of priorities; 2^54 commands last 5,000 years at 100,000 a second.
CREATE OR REPLACE FUNCTION commandbus._place(p_priority smallint) RETURNS bigint
LANGUAGE plpgsql AS $$
BEGIN
    RETURN ((100 - p_priority)::bigint << 54) + nextval('commandbus.command_seq');
END $$;

-- _hold: the fence. The rows whose lease these items bear: same delivery, same token, still in progress.
-- p_items: [{command_id, delivery, lease_token, ...}, ...]
-- Raises CB001 when an id stands there twice: two outcomes of one command cannot both be recorded.
-- Locks: those rows, in id order; a row that somebody else has locked is passed over, not waited for: an
-- operator's open transaction on one row must not stall the other leases.
-- The LATERAL with LIMIT pins the plan: one probe of the primary key an item, whatever the statistics say.
CREATE OR REPLACE FUNCTION commandbus._hold(p_domain text, p_items json) RETURNS tid[]
LANGUAGE plpgsql AS $$
DECLARE
    v_held tid[];
    v_once boolean;
BEGIN
    -- One pass: reading the items from JSON again for the second question took 1.3 us each.
    SELECT coalesce(array_agg(h.ctid) FILTER (WHERE h.ctid IS NOT NULL), '{}'),
           count(*) = count(DISTINCT i.command_id)
      INTO v_held, v_once
      FROM (SELECT * FROM json_to_recordset(p_items) AS i(command_id uuid, delivery bigint, lease_token uuid)
            ORDER BY i.command_id) i
      LEFT JOIN LATERAL (
        SELECT c.ctid FROM commandbus.command c
        WHERE c.domain = p_domain AND c.command_id = i.command_id
          AND c.status = 'IN_PROGRESS' AND c.delivery = i.delivery AND c.lease_token = i.lease_token
        LIMIT 1 FOR UPDATE SKIP LOCKED) h ON true;
    IF NOT v_once THEN
        RAISE EXCEPTION 'a command is named twice in one call'
            USING ERRCODE = 'CB001', HINT = 'Nothing was written; name each command once.';
    END IF;
    RETURN v_held;
END $$;

-- _answer: one row an item. done: in p_done, or this very lease had finished it before (a repeated call);
-- busy: the lease stands but somebody has locked the row, try again; lost: the lease is another's or gone.
CREATE OR REPLACE FUNCTION commandbus._answer(p_domain text, p_items json, p_done uuid[])
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    i record;
BEGIN
    RETURN QUERY SELECT d, 'done' FROM unnest(p_done) d;
    IF cardinality(p_done) = json_array_length(p_items) THEN
        RETURN;
    END IF;
    FOR i IN SELECT * FROM json_to_recordset(p_items) AS i(command_id uuid, delivery bigint, lease_token uuid)
             WHERE i.command_id <> ALL (p_done) LOOP
        command_id := i.command_id;
        IF EXISTS (SELECT FROM commandbus.command c
                   WHERE c.domain = p_domain AND c.command_id = i.command_id AND c.status = 'IN_PROGRESS'
                     AND c.delivery = i.delivery AND c.lease_token = i.lease_token) THEN
            outcome := 'busy';
        ELSIF EXISTS (SELECT FROM commandbus.command_history h
                      WHERE h.domain = p_domain AND h.command_id = i.command_id
                        AND h.presented_token = i.lease_token) THEN
            outcome := 'done';
        ELSE
            outcome := 'lost';
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

-- _finish: the one door to a terminal status. Moves rows that the caller has locked, with their events, to history.
-- any unfinished -> p_status. p_items: [{command_id, lease_token, result, error}, ...]; a lease_token there says
-- that a worker finished it, which counts as an attempt.
-- Replies go out and batches are counted here, so that nothing can end without them.
-- Locks: the rows (held already), then their events, then their batches by id.
CREATE OR REPLACE FUNCTION commandbus._finish(p_held tid[], p_status text, p_items json) RETURNS uuid[]
LANGUAGE plpgsql AS $$
DECLARE
    v_now      timestamptz := commandbus.clock();
    v_done     uuid[];
    v_eventful uuid[];
    v_asked    uuid[];
    v_awaited  uuid[];
    v_address  text[];
    v_batches  uuid[];
    v_domain   text;
BEGIN
    IF cardinality(p_held) = 0 THEN
        RETURN '{}';
    END IF;
    PERFORM commandbus._make_partition(v_now);
    WITH gone AS (
        DELETE FROM commandbus.command c WHERE c.ctid = ANY (p_held) RETURNING c.*
    ), moved AS (
        INSERT INTO commandbus.command_history AS h
            (domain, command_id, command_type, status, priority, max_attempts, attempts, crashes, events, delivery,
             lease_token, lease_until, claimed_at, worker, presented_token, sent_at, not_before, finished_at,
             correlation_id, reply_to, batch_id, data_hash, data, headers, result, error)
        SELECT g.domain, g.command_id, g.command_type, p_status, g.priority, g.max_attempts,
               g.attempts + CASE WHEN i.lease_token IS NULL THEN 0 ELSE 1 END, g.crashes, g.events, g.delivery,
               g.lease_token, g.lease_until, g.claimed_at, g.worker, i.lease_token, g.sent_at, g.not_before, v_now,
               g.correlation_id, g.reply_to, g.batch_id, g.data_hash, g.data, g.headers, i.result,
               CASE WHEN p_status = 'COMPLETED' THEN NULL ELSE coalesce(i.error, g.error) END
        FROM gone g
        JOIN json_to_recordset(p_items) AS i(command_id uuid, lease_token uuid, result jsonb, error jsonb)
          ON i.command_id = g.command_id
        RETURNING h.domain, h.command_id, h.events, h.reply_to, h.batch_id
    )
    SELECT array_agg(m.command_id), array_agg(m.command_id) FILTER (WHERE m.events > 0), min(m.domain),
           array_agg(m.command_id) FILTER (WHERE m.reply_to NOT LIKE '?%'),
           array_agg(m.command_id) FILTER (WHERE m.reply_to LIKE '?%'),
           array_agg(m.reply_to) FILTER (WHERE m.reply_to LIKE '?%'),
           array_agg(m.batch_id) FILTER (WHERE m.batch_id IS NOT NULL)
      INTO v_done, v_eventful, v_domain, v_asked, v_awaited, v_address, v_batches FROM moved m;
    IF v_eventful IS NOT NULL THEN
        WITH gone AS (
            DELETE FROM commandbus.audit_event e
            WHERE e.domain = v_domain AND e.command_id = ANY (v_eventful) RETURNING e.*
        )
        INSERT INTO commandbus.audit_history
            (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery, attempt, worker,
             claimed_at, lease_token, presented_token, operator, reason, error, details, finished_at)
        SELECT g.domain, g.command_id, g.event_no, g.event, g.occurred_at, g.from_status, g.to_status, g.delivery,
               g.attempt, g.worker, g.claimed_at, g.lease_token, g.presented_token, g.operator, g.reason, g.error,
               g.details, v_now
        FROM gone g;
    END IF;
    IF v_asked IS NOT NULL THEN
        PERFORM commandbus._reply(v_domain, v_asked, v_now);
    END IF;
    IF v_awaited IS NOT NULL THEN
        PERFORM commandbus._tell_waiting(v_awaited, v_address);
    END IF;
    IF v_batches IS NOT NULL THEN
        PERFORM commandbus._count(v_domain, v_batches, p_status);
    END IF;
    RETURN coalesce(v_done, '{}');
END $$;
