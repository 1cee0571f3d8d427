-- The desk of operators: which workers are there, and why a command waits. No transition depends on any of it.

-- announce_v1: this worker works for this domain, on commands of these types; said anew every few seconds.
-- Removes the rows of the domain that nobody has renewed for a day: of workers that could not say goodbye.
-- from -> to: none. Locks: its own row, waited for up to 1 s (a worker
-- that gives up would leave its session waiting); those it removes, never waiting for one.
CREATE OR REPLACE FUNCTION commandbus.announce_v1(
    p_worker text, p_domain text, p_command_types text[], p_concurrency integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
DECLARE
    v_now timestamptz := commandbus.clock();
BEGIN
    INSERT INTO commandbus.worker AS w (domain, worker, command_types, concurrency, started_at, seen_at)
    VALUES (p_domain, p_worker, p_command_types, p_concurrency, v_now, v_now)
    ON CONFLICT (domain, worker) DO UPDATE
    SET command_types = excluded.command_types, concurrency = excluded.concurrency, seen_at = excluded.seen_at;
    DELETE FROM commandbus.worker w WHERE w.ctid = ANY (ARRAY(
        SELECT o.ctid FROM commandbus.worker o
        WHERE o.domain = p_domain AND o.seen_at < v_now - interval '1 day' FOR UPDATE SKIP LOCKED));
END $$;

-- leave_v1: this worker has stopped. from -> to: none. Locks: its rows, waited for up to 1 s.
CREATE OR REPLACE FUNCTION commandbus.leave_v1(p_worker text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
BEGIN
    DELETE FROM commandbus.worker w WHERE w.worker = p_worker;
END $$;

-- explain_v1: why an unfinished command is where it is; no row for a finished one. The first that holds:
--   IN_PROGRESS         worker has a lease on it, until then
--   PARKED              an operator has to decide
--   BACK_OFF, DELAY     not before until: an attempt has failed, or it was sent with a delay
--   NO_WORKER           no worker of the domain was seen for 30 s
--   NO_WORKER_FOR_TYPE  none of those that were knows the type
--   ALONE               it crashed twice: it runs when a worker has nothing else under way
--   BEHIND              ahead commands stand before it that the same workers take; counted up to 10,000
-- workers: how many that were seen lately know the type, whatever the reason is.
-- from -> to: none. Locks: none; STABLE, so that all of it is one snapshot. Raises CB002 no such command.
CREATE OR REPLACE FUNCTION commandbus.explain_v1(p_domain text, p_command_id uuid)
RETURNS TABLE (reason text, until timestamptz, ahead bigint, worker text, workers bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now     timestamptz := commandbus.clock();
    v_command commandbus.command;
    v_alive   bigint;
BEGIN
    SELECT c.* INTO v_command FROM commandbus.command c WHERE c.domain = p_domain AND c.command_id = p_command_id;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM commandbus.command_history h
                       WHERE h.domain = p_domain AND h.command_id = p_command_id) THEN
            RAISE EXCEPTION 'command % is not in domain "%"', p_command_id, p_domain
                USING ERRCODE = 'CB002', HINT = 'Look at the id and the domain; retention drops finished commands.';
        END IF;
        RETURN;
    END IF;
    SELECT count(*), count(*) FILTER (WHERE v_command.command_type = ANY (w.command_types)) INTO v_alive, workers
      FROM commandbus.worker w WHERE w.domain = p_domain AND w.seen_at > v_now - interval '30 s';
    reason := CASE
        WHEN v_command.status = 'IN_PROGRESS' THEN 'IN_PROGRESS'
        WHEN v_command.status = 'IN_TROUBLESHOOTING_QUEUE' THEN 'PARKED'
        WHEN v_command.due_at > v_now THEN CASE WHEN v_command.attempts > 0 THEN 'BACK_OFF' ELSE 'DELAY' END
        WHEN v_alive = 0 THEN 'NO_WORKER'
        WHEN workers = 0 THEN 'NO_WORKER_FOR_TYPE'
        WHEN v_command.crashes >= 2 THEN 'ALONE'
        ELSE 'BEHIND' END;
    until := CASE reason WHEN 'IN_PROGRESS' THEN v_command.lease_until
                         WHEN 'BACK_OFF' THEN v_command.due_at WHEN 'DELAY' THEN v_command.due_at END;
    worker := CASE reason WHEN 'IN_PROGRESS' THEN v_command.worker END;
    IF reason = 'BEHIND' THEN  -- one that is due but not promoted will stand at the end of its priority
        v_command.place := coalesce(v_command.place, (101 - v_command.priority)::bigint << 54);
        ahead := (
            SELECT count(*) FROM (
                SELECT FROM (
                    SELECT DISTINCT t.command_type FROM commandbus.worker w, unnest(w.command_types) AS t(command_type)
                    WHERE w.domain = p_domain AND w.seen_at > v_now - interval '30 s'
                      AND v_command.command_type = ANY (w.command_types)) t
                CROSS JOIN LATERAL (
                    SELECT FROM commandbus.command q
                    WHERE q.domain = p_domain AND q.command_type = t.command_type AND q.place < v_command.place
                      AND q.status = 'PENDING' LIMIT 10000) q
                LIMIT 10000) n);
    END IF;
    RETURN NEXT;
END $$;
