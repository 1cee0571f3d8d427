-- The life of a process. Its steps are commands like any others, with the process's domain in reply_to; their outcomes
-- come back as commands of type Reply, timers as commands of type Timer, and workers of that domain handle both.
--
--   (started) --> RUNNING
--   RUNNING --> COMPLETED        Finish, and no step is open
--   RUNNING --> COMPENSATING     Compensate, the deadline of the process, or an operator's cancel
--   COMPENSATING --> COMPENSATED all that was done is undone
--   COMPENSATING --> FAILED      the same, but an undo failed or was canceled
--
-- What follows from an outcome is asked of the class while the process runs; compensation needs no class and stands
-- here. Locks, in order: the process, its steps, their commands; nobody who holds a command waits for a process.
-- take_reply_v1 and advance_process_v1 belong into one transaction, that which completes the Reply: the lock on the
-- process holds between them, and the fence of the Reply's lease is that of what they write.

-- _lock_process: locks a process for a verb. Raises CB002 no such process, CB003 its status does not allow the verb.
CREATE OR REPLACE FUNCTION commandbus._lock_process(
    p_domain text, p_process_id uuid, p_verb text, p_from text[], p_operator text) RETURNS commandbus.process
LANGUAGE plpgsql AS $$
DECLARE
    p commandbus.process;
BEGIN
    IF coalesce(p_operator, '') = '' THEN
        RAISE EXCEPTION 'process %: the operator has no name', p_process_id
            USING ERRCODE = 'CB001', HINT = 'Say who acts; the audit trail keeps it.';
    END IF;
    SELECT t.* INTO p FROM commandbus.process t WHERE t.domain = p_domain AND t.process_id = p_process_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'process % is not in domain "%"', p_process_id, p_domain
            USING ERRCODE = 'CB002', HINT = 'Look at the id and the domain; retention drops finished processes.';
    ELSIF p.status <> ALL (p_from) THEN
        RAISE EXCEPTION 'process % is %: cannot % it', p_process_id, p.status, p_verb
            USING ERRCODE = 'CB003', HINT = 'Somebody was first, or it has ended. Read the process and decide anew.';
    END IF;
    RETURN p;
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'process % is locked by another transaction: cannot % it', p_process_id, p_verb
        USING ERRCODE = 'CB003', HINT = 'Nothing was written; try again when that transaction has ended.';
END $$;

-- _send_steps: sends these commands of a process, and notes them as its steps.
-- p_items: [{kind, name, command, undo, undo_begun, of, whole, until}, ...]; command and undo as send_v1 takes them.
-- A deadline stands behind its step, unless it is that of the whole process. until: a moment, in place of a delay.
-- An undo that is sent stands alone; it was checked with its step. Raises CB001 for one that could not be sent, which the
-- library cannot know of: it does not always know the setting. And what send_v1 raises.
CREATE OR REPLACE FUNCTION commandbus._send_steps(p commandbus.process, p_items jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_now   timestamptz := commandbus.clock();
    v_count integer;
    v_rows  jsonb;
    v_name  text;
BEGIN
    IF coalesce(jsonb_array_length(p_items), 0) = 0 THEN
        RETURN;
    END IF;
    SELECT i.name INTO v_name FROM jsonb_to_recordset(p_items) AS i(name text, undo jsonb)
    WHERE octet_length(i.undo ->> 'data') > 128  -- as in send_v1
      AND NOT commandbus._in_bounds(i.undo -> 'data', (SELECT l.max_data_bytes FROM commandbus.limits_v1() l)) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'process %: the data of the undo of % are out of bounds', p.process_id, v_name
            USING ERRCODE = 'CB001', HINT = format(
                'Nothing was written; they may have max_data_bytes (%s) as text and 64 levels.',
                (SELECT l.max_data_bytes FROM commandbus.limits_v1() l));
    END IF;
    UPDATE commandbus.process AS t SET steps = t.steps + jsonb_array_length(p_items)
    WHERE t.domain = p.domain AND t.process_id = p.process_id RETURNING t.steps INTO v_count;
    v_count := v_count - jsonb_array_length(p_items);
    WITH item AS (
        SELECT i.* FROM ROWS FROM (jsonb_to_recordset(p_items) AS (
            kind text, name text, command jsonb, undo jsonb, undo_begun boolean, of integer, whole boolean,
            until timestamptz)) WITH ORDINALITY
            AS i(kind, name, command, undo, undo_begun, of_number, whole, until, n)
    ), noted AS (
        INSERT INTO commandbus.process_step
            (domain, command_id, process_id, number, kind, name, of_number, command_domain, undo, undo_begun, sent_at)
        SELECT p.domain, (i.command ->> 'command_id')::uuid, p.process_id, v_count + i.n, i.kind, i.name,
               CASE WHEN i.kind = 'deadline' AND i.whole IS NULL THEN v_count + i.n - 1 ELSE i.of_number END,
               i.command ->> 'domain', i.undo, coalesce(i.undo_begun, false), v_now
        FROM item i
    )
    SELECT jsonb_agg(CASE WHEN i.until IS NULL THEN i.command ELSE i.command || jsonb_build_object(
               'delay', greatest(0, extract(epoch FROM i.until - v_now))) END ORDER BY i.n)
      INTO v_rows FROM item i;
    IF p_items #>> '{0,kind}' = 'undo' THEN
        PERFORM commandbus._send_undo(v_rows -> 0, v_now);
    ELSE
        PERFORM commandbus.send_v1(v_rows::text);
    END IF;
END $$;

-- _send_undo: (sent) -> PENDING | SCHEDULED. Not through send_v1: what was accepted with its step is sent, also when
-- the owner has lowered max_data_bytes since.
CREATE OR REPLACE FUNCTION commandbus._send_undo(p_undo jsonb, p_now timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_due timestamptz := p_now + make_interval(secs => (p_undo ->> 'delay')::double precision);
BEGIN
    PERFORM commandbus._send_prepared(
        jsonb_build_object('headers', '{}'::jsonb, 'priority', 0) || p_undo || jsonb_build_object(
            'status', CASE WHEN v_due > p_now THEN 'SCHEDULED' ELSE 'PENDING' END, 'sent_at', p_now,
            'not_before', v_due,
            'data_hash', commandbus._data_hash(p_undo ->> 'command_type', p_undo -> 'data')));
END $$;

-- _withdraw: cancels a command of a process, if it is unfinished; one that a worker runs only with p_running.
-- Any unfinished -> CANCELED. Its reply comes as that of any other, and closes the step.
CREATE OR REPLACE FUNCTION commandbus._withdraw(
    p_domain text, p_command_id uuid, p_running boolean, p_operator text, p_reason text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_command commandbus.command;
BEGIN
    SELECT c.* INTO v_command FROM commandbus.command c
    WHERE c.domain = p_domain AND c.command_id = p_command_id FOR UPDATE;
    IF FOUND AND (p_running OR v_command.status <> 'IN_PROGRESS') THEN
        PERFORM commandbus._end(v_command, 'CANCELED', 'CANCELED', p_operator, p_reason);
    END IF;
END $$;

-- _stop_timers: closes the open timers of a process of these kinds; p_of: only the deadline of this step.
CREATE OR REPLACE FUNCTION commandbus._stop_timers(
    p commandbus.process, p_kinds text[], p_reason text, p_of integer DEFAULT NULL, p_operator text DEFAULT NULL)
RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    v_names text[] := '{}';
    t       record;
BEGIN
    FOR t IN
        UPDATE commandbus.process_step AS s SET status = 'CANCELED', ended_at = commandbus.clock()
        WHERE s.domain = p.domain AND s.process_id = p.process_id AND s.status = 'OPEN' AND s.kind = ANY (p_kinds)
          AND (p_of IS NULL OR s.of_number = p_of)
        RETURNING s.command_id, s.name
    LOOP
        PERFORM commandbus._withdraw(p.domain, t.command_id, true, p_operator, p_reason);
        v_names := v_names || t.name;
    END LOOP;
    RETURN v_names;
END $$;

-- _end_process: RUNNING, COMPENSATING -> p_status, one of the three ends.
CREATE OR REPLACE FUNCTION commandbus._end_process(p commandbus.process, p_status text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM commandbus._stop_timers(p, '{wait,deadline}', 'the process has ended');
    UPDATE commandbus.process AS t SET status = p_status, finished_at = commandbus.clock()
    WHERE t.domain = p.domain AND t.process_id = p.process_id;
END $$;

-- _compensate: RUNNING -> COMPENSATING. Of the steps that are open, what no worker runs is canceled: nobody needs it any
-- more, least of all an operator. What runs is awaited: it may succeed, and is undone then. What has ended and whose
-- reply is parked goes on: its class failed at that, and is not asked any more.
CREATE OR REPLACE FUNCTION commandbus._compensate(p commandbus.process, p_error jsonb, p_operator text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    s record;
    c commandbus.command;
BEGIN
    UPDATE commandbus.process AS t SET status = 'COMPENSATING', error = p_error, result = NULL
    WHERE t.domain = p.domain AND t.process_id = p.process_id;
    PERFORM commandbus._stop_timers(p, '{wait}', 'the process is compensated');
    FOR s IN SELECT t.command_domain, t.command_id FROM commandbus.process_step t
             WHERE t.domain = p.domain AND t.process_id = p.process_id AND t.kind = 'step' AND t.status = 'OPEN'
             ORDER BY t.number LOOP
        PERFORM commandbus._withdraw(s.command_domain, s.command_id, false, p_operator, 'the process is compensated');
    END LOOP;
    FOR c IN SELECT q.* FROM commandbus.command q
             WHERE q.domain = p.domain AND q.parked_at IS NOT NULL AND q.command_type = 'Reply'
               AND q.data ->> 'command_id' IN (
                   SELECT t.command_id::text FROM commandbus.process_step t
                   WHERE t.domain = p.domain AND t.process_id = p.process_id AND t.status = 'OPEN')
             ORDER BY q.command_id FOR UPDATE LOOP
        PERFORM commandbus._retry(c, coalesce(p_operator, 'commandbus'), 'the process is compensated', NULL);
    END LOOP;
    PERFORM commandbus._undo_next(p);
END $$;

-- _undo_next: undoes what was completed last and is not undone yet, once nothing is open; COMPENSATING -> COMPENSATED
-- or FAILED when nothing is left.
CREATE OR REPLACE FUNCTION commandbus._undo_next(p commandbus.process) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_step commandbus.process_step;
BEGIN
    IF EXISTS (SELECT FROM commandbus.process_step s WHERE s.domain = p.domain AND s.process_id = p.process_id
               AND s.status = 'OPEN' AND s.kind IN ('step', 'undo')) THEN
        RETURN;
    END IF;
    SELECT s.* INTO v_step FROM commandbus.process_step s
    WHERE s.domain = p.domain AND s.process_id = p.process_id AND s.undo IS NOT NULL
      AND NOT EXISTS (SELECT FROM commandbus.process_step u WHERE u.domain = p.domain AND u.process_id = p.process_id
                      AND u.kind = 'undo' AND u.of_number = s.number)
    ORDER BY s.applied DESC LIMIT 1;
    IF FOUND THEN
        PERFORM commandbus._send_steps(p, jsonb_build_array(jsonb_build_object(
            'kind', 'undo', 'name', v_step.name, 'of', v_step.number, 'command', v_step.undo)));
    ELSE
        PERFORM commandbus._end_process(p, CASE WHEN EXISTS (
            SELECT FROM commandbus.process_step s WHERE s.domain = p.domain AND s.process_id = p.process_id
            AND s.kind = 'undo' AND s.status <> 'COMPLETED') THEN 'FAILED' ELSE 'COMPENSATED' END);
    END IF;
END $$;

-- _follow: does what a class has decided. p_next: {send: [...], result, error}; see _send_steps. A result ends the
-- process once no step is open, an error compensates it. Raises CB003 when it would wait for nothing.
CREATE OR REPLACE FUNCTION commandbus._follow(p commandbus.process, p_next jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_result jsonb;
BEGIN
    PERFORM commandbus._send_steps(p, p_next -> 'send');
    IF p_next ? 'error' THEN
        PERFORM commandbus._compensate(p, p_next -> 'error');
        RETURN;
    END IF;
    UPDATE commandbus.process AS t SET result = coalesce(p_next -> 'result', t.result)
    WHERE t.domain = p.domain AND t.process_id = p.process_id RETURNING t.result INTO v_result;
    IF v_result IS NOT NULL THEN
        PERFORM commandbus._stop_timers(p, '{wait}', 'the process has finished');
    END IF;
    IF NOT EXISTS (SELECT FROM commandbus.process_step s WHERE s.domain = p.domain AND s.process_id = p.process_id
                   AND s.status = 'OPEN' AND s.kind IN ('step', 'wait')) THEN
        IF v_result IS NULL THEN
            RAISE EXCEPTION 'process % would wait for ever: no step is open, and none was sent', p.process_id
                USING ERRCODE = 'CB003', HINT = 'Let the method of the last step return what comes next, or Finish.';
        END IF;
        PERFORM commandbus._end_process(p, 'COMPLETED');
    END IF;
END $$;

-- start_process_v1: (started) -> RUNNING, and its first steps are sent. Durable when the caller's transaction commits.
-- p_process: {domain, process_id, process_type, given, state, state_version, deadline (seconds)}; given is the state
-- before the first step changed it. Answers accepted, duplicate (same id, type and given state; nothing is written) or
-- conflict. Locks: waits for an uncommitted process of the same id. Raises what send_v1 and _follow raise.
CREATE OR REPLACE FUNCTION commandbus.start_process_v1(p_process text, p_next text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_now  timestamptz := commandbus.clock();
    v_hash bytea;
    p      commandbus.process;
BEGIN
    INSERT INTO commandbus.process AS t
        (domain, process_id, process_type, status, state, state_version, data_hash, deadline, started_at, updated_at)
    SELECT g.domain, g.process_id, g.process_type, 'RUNNING', g.state, g.state_version,
           sha256(convert_to(g.process_type || ' ' || g.given::text, 'UTF8')),
           v_now + make_interval(secs => g.deadline), v_now, v_now
    FROM jsonb_to_record(p_process::jsonb) AS g(domain text, process_id uuid, process_type text, given jsonb,
                                                state jsonb, state_version integer, deadline double precision)
    ON CONFLICT (domain, process_id) DO NOTHING RETURNING t.* INTO p;
    IF FOUND THEN
        PERFORM commandbus._follow(p, p_next::jsonb);
        RETURN 'accepted';
    END IF;
    PERFORM pg_logical_emit_message(true, 'commandbus', '');  -- as durable as what it repeats: see _settle_own_id
    SELECT t.data_hash INTO v_hash FROM commandbus.process t
    WHERE t.domain = p_process::jsonb ->> 'domain' AND t.process_id = (p_process::jsonb ->> 'process_id')::uuid;
    RETURN CASE WHEN v_hash = sha256(convert_to(
        (p_process::jsonb ->> 'process_type') || ' ' || (p_process::jsonb -> 'given')::text, 'UTF8'))
        THEN 'duplicate' ELSE 'conflict' END;
END $$;

-- take_reply_v1: applies the outcome of a step, or a timer that is due, to its process, and locks that. p_command_id is
-- the step's command, p_error JSON text. While the process runs, a row says what its class has to decide on; none when
-- nothing is to be decided: it is compensated, the outcome was applied before, or no process knows the command.
CREATE OR REPLACE FUNCTION commandbus.take_reply_v1(p_domain text, p_command_id uuid, p_status text, p_error text)
RETURNS TABLE (process_id uuid, process_type text, state text, state_version integer, revision integer, name text,
               error text, open text[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    p     commandbus.process;
    s     commandbus.process_step;
    v_now timestamptz;
BEGIN
    SELECT q.* INTO p FROM commandbus.process q
    WHERE q.domain = p_domain AND q.process_id = (
        SELECT t.process_id FROM commandbus.process_step t WHERE t.domain = p_domain AND t.command_id = p_command_id)
    FOR UPDATE;
    v_now := commandbus.clock();
    UPDATE commandbus.process_step AS t
    SET status = p_status, applied = p.revision + 1, ended_at = v_now,
        error = CASE WHEN t.expired AND p_status = 'CANCELED' THEN commandbus._deadline_error(t.name, p_error)
                     ELSE p_error::jsonb END,
        undo = CASE WHEN p_status = 'COMPLETED' THEN t.undo
                    WHEN t.undo_begun AND p_status = 'CANCELED' AND EXISTS (
                        SELECT FROM commandbus.command_history h WHERE h.domain = t.command_domain
                        AND h.command_id = t.command_id AND h.delivery > 0) THEN t.undo END
    WHERE t.domain = p_domain AND t.command_id = p_command_id AND t.status = 'OPEN' RETURNING t.* INTO s;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE commandbus.process AS t SET revision = t.revision + 1, updated_at = v_now
    WHERE t.domain = p_domain AND t.process_id = p.process_id RETURNING t.* INTO p;
    IF s.kind = 'deadline' AND s.of_number IS NULL THEN
        IF p.status = 'RUNNING' THEN
            PERFORM commandbus._compensate(p, commandbus._deadline_error(p.process_type, NULL));
        END IF;
    ELSIF s.kind = 'deadline' THEN
        UPDATE commandbus.process_step AS t SET expired = true
        WHERE t.domain = p_domain AND t.process_id = p.process_id AND t.number = s.of_number AND t.status = 'OPEN'
        RETURNING t.* INTO s;
        PERFORM commandbus._withdraw(s.command_domain, s.command_id, true, NULL, 'its deadline is over') WHERE FOUND;
    ELSE
        PERFORM commandbus._stop_timers(p, '{deadline}', 'its step has ended', s.number);
        IF p.status = 'RUNNING' THEN
            RETURN QUERY SELECT p.process_id, p.process_type, p.state::text, p.state_version, p.revision, s.name,
                s.error::text, ARRAY(
                    SELECT t.name FROM commandbus.process_step t WHERE t.domain = p_domain
                    AND t.process_id = p.process_id AND t.status = 'OPEN' AND t.kind IN ('step', 'wait')
                    ORDER BY t.number);
        ELSE
            PERFORM commandbus._undo_next(p);
        END IF;
    END IF;
END $$;

-- _deadline_error: what is told of a step or a process that took too long; p_error: what was told of it before.
CREATE OR REPLACE FUNCTION commandbus._deadline_error(p_name text, p_error text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN jsonb_build_object('code', 'DEADLINE', 'message', format('The deadline of %s is over.', p_name),
                              'details', p_error::jsonb);
END $$;

-- advance_process_v1: keeps the state, and does what the class has decided on what take_reply_v1 has told in this
-- transaction; p_revision says so. RUNNING -> RUNNING, COMPLETED or COMPENSATING. Raises CB003, and what send_v1 raises.
CREATE OR REPLACE FUNCTION commandbus.advance_process_v1(
    p_domain text, p_process_id uuid, p_revision integer, p_state text, p_state_version integer, p_next text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
DECLARE
    p commandbus.process;
BEGIN
    UPDATE commandbus.process AS t SET state = p_state::jsonb, state_version = p_state_version
    WHERE t.domain = p_domain AND t.process_id = p_process_id AND t.revision = p_revision AND t.status = 'RUNNING'
    RETURNING t.* INTO p;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'process % went on without this', p_process_id
            USING ERRCODE = 'CB003', HINT = 'Nothing was written; apply replies in one transaction each.';
    END IF;
    PERFORM commandbus._follow(p, p_next::jsonb);
END $$;

-- cancel_process_v1: RUNNING -> COMPENSATING, as if its class had said so, with the error CANCELED.
CREATE OR REPLACE FUNCTION commandbus.cancel_process_v1(
    p_domain text, p_process_id uuid, p_operator text, p_reason text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM commandbus._compensate(
        commandbus._lock_process(p_domain, p_process_id, 'cancel', '{RUNNING}', p_operator),
        jsonb_build_object('code', 'CANCELED', 'message', coalesce(p_reason, ''),
                           'details', jsonb_build_object('operator', p_operator)), p_operator);
END $$;

-- resume_process_v1: the waits of a process end now; answers their names. RUNNING stays. Raises CB003 without a wait.
CREATE OR REPLACE FUNCTION commandbus.resume_process_v1(
    p_domain text, p_process_id uuid, p_operator text, p_reason text) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
DECLARE
    p       commandbus.process := commandbus._lock_process(p_domain, p_process_id, 'resume', '{RUNNING}', p_operator);
    v_names text[] := commandbus._stop_timers(p, '{wait}', coalesce(p_reason, 'resumed'), NULL, p_operator);
    v_name  text;
BEGIN
    IF v_names = '{}' THEN
        RAISE EXCEPTION 'process % waits for no moment: cannot resume it', p_process_id
            USING ERRCODE = 'CB003', HINT = 'Nothing was written; its timeline shows what is open.';
    END IF;
    FOREACH v_name IN ARRAY v_names LOOP
        PERFORM commandbus._send_steps(p, jsonb_build_array(jsonb_build_object(
            'kind', 'wait', 'name', v_name, 'command', jsonb_build_object(
                'domain', p_domain, 'command_id', gen_random_uuid(), 'minted', true, 'command_type', 'Timer',
                'data', v_name, 'correlation_id', p_process_id))));
    END LOOP;
    RETURN v_names;
END $$;

-- retry_process_v1: what holds a process up goes on: its parked commands and replies go back in line, and a reply that
-- somebody has canceled is sent again. Answers how many. IN_TROUBLESHOOTING_QUEUE -> PENDING. Raises CB003 for none.
CREATE OR REPLACE FUNCTION commandbus.retry_process_v1(
    p_domain text, p_process_id uuid, p_operator text, p_reason text) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
DECLARE
    p       commandbus.process := commandbus._lock_process(
        p_domain, p_process_id, 'retry', '{RUNNING,COMPENSATING}', p_operator);
    v_count integer := 0;
    c       commandbus.command;
    s       record;
BEGIN
    FOR s IN SELECT t.command_domain, t.command_id, h.finished_at FROM commandbus.process_step t
             LEFT JOIN commandbus.command_history h ON h.domain = t.command_domain AND h.command_id = t.command_id
             WHERE t.domain = p_domain AND t.process_id = p_process_id AND t.status = 'OPEN'
               AND (h.finished_at IS NULL OR t.kind IN ('step', 'undo'))  -- a timer that was canceled is not wanted
             ORDER BY t.number LOOP
        IF s.finished_at IS NULL THEN
            SELECT q.* INTO c FROM commandbus.command q
            WHERE q.domain = s.command_domain AND q.command_id = s.command_id LIMIT 1 FOR UPDATE;
        ELSE
            SELECT q.* INTO c FROM commandbus.command q
            WHERE q.domain = p_domain AND q.command_type = 'Reply' AND q.data ->> 'command_id' = s.command_id::text
            LIMIT 1 FOR UPDATE;
        END IF;
        IF c.parked_at IS NOT NULL THEN
            PERFORM commandbus._retry(c, p_operator, p_reason, NULL);
        ELSIF NOT FOUND AND s.finished_at IS NOT NULL THEN
            PERFORM commandbus._reply(s.command_domain, ARRAY[s.command_id], s.finished_at, commandbus.clock());
        ELSE
            CONTINUE;
        END IF;
        v_count := v_count + 1;
    END LOOP;
    IF v_count = 0 THEN
        RAISE EXCEPTION 'nothing of process % is parked: cannot retry it', p_process_id
            USING ERRCODE = 'CB003', HINT = 'Nothing was written; its timeline shows what is open.';
    END IF;
    RETURN v_count;
END $$;
