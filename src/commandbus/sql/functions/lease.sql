-- The verbs of a worker that holds leases. p_items names them: [{command_id, delivery, lease_token, ...}, ...].
-- Each answers a row an item: done; busy (somebody has locked the row: try again); lost (the lease is another's or
-- gone: nothing was written). Raises CB001 when a command is named twice. Locks: the rows behind the fence
-- commandbus._hold, in id order, never waiting for one.

-- renew_v1: the leases last p_lease seconds from now. IN_PROGRESS stays; a HOT update.
CREATE OR REPLACE FUNCTION commandbus.renew_v1(p_domain text, p_items text, p_lease double precision)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_held tid[] := commandbus._hold(p_domain, p_items::json);
    v_done uuid[];
BEGIN
    WITH renewed AS (
        UPDATE commandbus.command AS c SET lease_until = commandbus.clock() + make_interval(secs => p_lease)
        WHERE c.ctid = ANY (v_held) RETURNING c.command_id
    )
    SELECT coalesce(array_agg(r.command_id), '{}') INTO v_done FROM renewed r;
    RETURN QUERY SELECT a.* FROM commandbus._answer(p_domain, p_items::json, v_done) a;
END $$;

-- complete_v1: the handler is done; result is kept. IN_PROGRESS -> COMPLETED. Calling again answers done again.
CREATE OR REPLACE FUNCTION commandbus.complete_v1(p_domain text, p_items text)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_held tid[] := commandbus._hold(p_domain, p_items::json);
    v_done uuid[] := commandbus._finish(v_held, 'COMPLETED', p_items::json);
BEGIN
    RETURN QUERY SELECT a.* FROM commandbus._answer(p_domain, p_items::json, v_done) a;
END $$;

-- fail_v1: the verdict of a handler that did not succeed; an attempt is counted. Items also carry kind, error
-- ({code, message, details}), retry_in (seconds) and max_attempts (of the handler's policy; the command's own goes
-- before it). kind BUSINESS: IN_PROGRESS -> FAILED. PERMANENT: -> IN_TROUBLESHOOTING_QUEUE. TRANSIENT: -> SCHEDULED,
-- or -> IN_TROUBLESHOOTING_QUEUE when attempts are used up.
CREATE OR REPLACE FUNCTION commandbus.fail_v1(p_domain text, p_items text)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_now   timestamptz := commandbus.clock();
    v_json  json := p_items;
    v_held  tid[] := commandbus._hold(p_domain, v_json);
    v_over  tid[];
    v_again tid[];
    v_done  uuid[];
    v_stuck uuid[];
BEGIN
    SELECT coalesce(array_agg(c.ctid) FILTER (WHERE i.kind = 'BUSINESS'), '{}'),
           coalesce(array_agg(c.ctid) FILTER (WHERE i.kind = 'TRANSIENT'
                AND c.attempts + 1 < coalesce(c.max_attempts, i.max_attempts)), '{}')
      INTO v_over, v_again
      FROM commandbus.command c
      JOIN json_to_recordset(v_json) AS i(command_id uuid, kind text, max_attempts integer)
        ON i.command_id = c.command_id
     WHERE c.ctid = ANY (v_held);
    v_done := commandbus._finish(v_over, 'FAILED', v_json);
    WITH failed AS (
        UPDATE commandbus.command AS c
        SET status = CASE WHEN c.ctid = ANY (v_again) THEN 'SCHEDULED' ELSE 'IN_TROUBLESHOOTING_QUEUE' END,
            due_at = CASE WHEN c.ctid = ANY (v_again) THEN v_now + make_interval(secs => i.retry_in) END,
            parked_at = CASE WHEN c.ctid = ANY (v_again) THEN NULL ELSE v_now END,
            place = NULL, alone_since = NULL, attempts = c.attempts + 1, events = c.events + 1, error = i.error
        FROM json_to_recordset(v_json) AS i(command_id uuid, lease_token uuid, kind text, error jsonb,
                                            retry_in double precision)
        WHERE c.ctid = ANY (v_held) AND i.command_id = c.command_id AND i.kind <> 'BUSINESS'
        RETURNING c.*, i.lease_token AS presented_token
    ), told AS (
        INSERT INTO commandbus.audit_event AS e
            (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery, attempt, worker,
             claimed_at, lease_token, presented_token, error)
        SELECT f.domain, f.command_id, f.events, CASE f.status WHEN 'SCHEDULED' THEN 'ATTEMPT_FAILED' ELSE 'PARKED' END,
               v_now, 'IN_PROGRESS', f.status, f.delivery, f.attempts, f.worker, f.claimed_at, f.lease_token,
               f.presented_token, f.error
        FROM failed f RETURNING e.command_id
    )
    SELECT v_done || coalesce(array_agg(t.command_id), '{}'),
           (SELECT array_agg(f.batch_id) FROM failed f WHERE f.parked_at IS NOT NULL AND f.batch_id IS NOT NULL)
      INTO v_done, v_stuck FROM told t;
    IF v_stuck IS NOT NULL THEN
        PERFORM commandbus._count(p_domain, v_stuck, 'IN_TROUBLESHOOTING_QUEUE');
    END IF;
    RETURN QUERY SELECT a.* FROM commandbus._answer(p_domain, v_json, v_done) a;
END $$;

-- release_v1: the worker gives the lease back before the handler ended; nothing is charged.
-- IN_PROGRESS -> PENDING, at the end of the line; a command that crashed twice waits alone again.
CREATE OR REPLACE FUNCTION commandbus.release_v1(p_domain text, p_items text)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_now  timestamptz := commandbus.clock();
    v_held tid[] := commandbus._hold(p_domain, p_items::json);
    v_done uuid[];
BEGIN
    WITH released AS (
        UPDATE commandbus.command AS c
        SET status = 'PENDING', events = c.events + 1,
            place = CASE WHEN c.crashes < 2 THEN commandbus._place(c.priority) END,
            alone_since = CASE WHEN c.crashes < 2 THEN NULL ELSE v_now END
        FROM json_to_recordset(p_items::json) AS i(command_id uuid, lease_token uuid)
        WHERE c.ctid = ANY (v_held) AND i.command_id = c.command_id
        RETURNING c.*, i.lease_token AS presented_token
    ), told AS (
        INSERT INTO commandbus.audit_event AS e
            (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery, worker, claimed_at,
             lease_token, presented_token)
        SELECT r.domain, r.command_id, r.events, 'RELEASED', v_now, 'IN_PROGRESS', 'PENDING', r.delivery, r.worker,
               r.claimed_at, r.lease_token, r.presented_token
        FROM released r RETURNING e.command_id
    )
    SELECT coalesce(array_agg(t.command_id), '{}') INTO v_done FROM told t;
    RETURN QUERY SELECT a.* FROM commandbus._answer(p_domain, p_items::json, v_done) a;
END $$;
