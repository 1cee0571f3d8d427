-- The verbs of people and of the application, one command a call; bulk.sql has many. Each is one conditional step: of
-- two rivals one wins, and the other is told so. Locks: the row, waited for up to 5 s; then its events.
-- The three of the operator raise CB001 for an operator without a name and for JSON that breaks a limit; all raise
-- CB002 no such command, CB003 its status does not allow it or somebody keeps it locked; nothing is written then.

-- _take: locks the command, if its status is one of p_from.
CREATE OR REPLACE FUNCTION commandbus._take(p_domain text, p_command_id uuid, p_verb text, p_from text[])
RETURNS commandbus.command
LANGUAGE plpgsql AS $$
DECLARE
    v_command commandbus.command;
    v_status  text;
BEGIN
    SELECT c.* INTO v_command FROM commandbus.command c
    WHERE c.domain = p_domain AND c.command_id = p_command_id FOR UPDATE;
    v_status := v_command.status;
    IF v_status IS NULL THEN
        SELECT h.status INTO v_status FROM commandbus.command_history h
        WHERE h.domain = p_domain AND h.command_id = p_command_id LIMIT 1;
    END IF;
    IF v_status IS NULL THEN
        RAISE EXCEPTION 'command % is not in domain "%"', p_command_id, p_domain
            USING ERRCODE = 'CB002', HINT = 'Look at the id and the domain; retention drops finished commands.';
    ELSIF v_status <> ALL (p_from) THEN
        RAISE EXCEPTION 'command % is %: cannot % it', p_command_id, v_status, p_verb
            USING ERRCODE = 'CB003', HINT = 'Somebody was first, or it was done already. Read the command and decide anew.';
    END IF;
    RETURN v_command;
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'command % is locked by another transaction: cannot % it', p_command_id, p_verb
        USING ERRCODE = 'CB003', HINT = 'Nothing was written; try again when that transaction has ended.';
END $$;

-- _tell: the audit event of an operator's or the application's action on a command that _take has locked.
CREATE OR REPLACE FUNCTION commandbus._tell(
    p_command commandbus.command, p_event text, p_to text, p_operator text, p_reason text, p_details jsonb DEFAULT NULL)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF p_event LIKE 'OPERATOR%' AND coalesce(p_operator, '') = '' THEN
        RAISE EXCEPTION 'command %: the operator has no name', p_command.command_id
            USING ERRCODE = 'CB001', HINT = 'Say who acts; the audit trail keeps it.';
    END IF;
    UPDATE commandbus.command AS c SET events = c.events + 1
    WHERE c.domain = p_command.domain AND c.command_id = p_command.command_id;
    INSERT INTO commandbus.audit_event
        (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery, worker, claimed_at,
         lease_token, operator, reason, error, details)
    VALUES (p_command.domain, p_command.command_id, p_command.events + 1, p_event, commandbus.clock(),
            p_command.status, p_to, p_command.delivery,
            CASE WHEN p_command.status = 'IN_PROGRESS' THEN p_command.worker END,
            CASE WHEN p_command.status = 'IN_PROGRESS' THEN p_command.claimed_at END,
            CASE WHEN p_command.status = 'IN_PROGRESS' THEN p_command.lease_token END,
            p_operator, p_reason, p_command.error, p_details);
    IF p_command.batch_id IS NOT NULL AND p_command.status = 'IN_TROUBLESHOOTING_QUEUE' THEN
        PERFORM commandbus._count(p_command.domain, ARRAY[p_command.batch_id], p_command.status, -1);
    END IF;
END $$;

-- _end: tells the event and finishes the command.
CREATE OR REPLACE FUNCTION commandbus._end(
    p_command commandbus.command, p_event text, p_to text, p_operator text, p_reason text, p_result text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM commandbus._tell(p_command, p_event, p_to, p_operator, p_reason);
    PERFORM commandbus._finish(
        ARRAY(SELECT c.ctid FROM commandbus.command c
              WHERE c.domain = p_command.domain AND c.command_id = p_command.command_id),
        p_to, json_build_array(json_build_object(
            'command_id', p_command.command_id,
            'result', commandbus._check_json(p_command.command_id, 'result', p_result))));
END $$;

-- _retry: tells the event and puts a parked command back in line; p_data, if given, replaces the data.
CREATE OR REPLACE FUNCTION commandbus._retry(
    p_command commandbus.command, p_operator text, p_reason text, p_data text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_data jsonb := commandbus._check_json(p_command.command_id, 'data', p_data,
                                           (SELECT l.max_data_bytes FROM commandbus.limits_v1() l));
BEGIN
    PERFORM commandbus._tell(
        p_command, 'OPERATOR_RETRIED', 'PENDING', p_operator, p_reason,
        CASE WHEN v_data IS NOT NULL THEN jsonb_build_object('old_data', p_command.data, 'new_data', v_data) END);
    UPDATE commandbus.command AS c
    SET status = 'PENDING', place = commandbus._place(c.priority), parked_at = NULL, attempts = 0, crashes = 0,
        error = NULL, data = coalesce(v_data, c.data)
    WHERE c.domain = p_command.domain AND c.command_id = p_command.command_id;
END $$;

-- cancel_v1: the command is not wanted any more. Any unfinished -> CANCELED; a running one loses its lease.
CREATE OR REPLACE FUNCTION commandbus.cancel_v1(p_domain text, p_command_id uuid, p_operator text, p_reason text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM commandbus._end(
        commandbus._take(p_domain, p_command_id, 'cancel',
                         '{PENDING,SCHEDULED,IN_PROGRESS,IN_TROUBLESHOOTING_QUEUE}'),
        'CANCELED', 'CANCELED', p_operator, p_reason);
END $$;

-- operator_cancel_v1: IN_TROUBLESHOOTING_QUEUE -> CANCELED.
CREATE OR REPLACE FUNCTION commandbus.operator_cancel_v1(
    p_domain text, p_command_id uuid, p_operator text, p_reason text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM commandbus._end(
        commandbus._take(p_domain, p_command_id, 'cancel', '{IN_TROUBLESHOOTING_QUEUE}'),
        'OPERATOR_CANCELED', 'CANCELED', p_operator, p_reason);
END $$;

-- operator_complete_v1: the operator has done the work by hand. IN_TROUBLESHOOTING_QUEUE -> COMPLETED, with p_result.
CREATE OR REPLACE FUNCTION commandbus.operator_complete_v1(
    p_domain text, p_command_id uuid, p_operator text, p_reason text, p_result text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM commandbus._end(
        commandbus._take(p_domain, p_command_id, 'complete', '{IN_TROUBLESHOOTING_QUEUE}'),
        'OPERATOR_COMPLETED', 'COMPLETED', p_operator, p_reason,
        p_result);
END $$;

-- operator_retry_v1: once more, with a full budget of attempts and crashes; p_data, if given, replaces the data.
-- IN_TROUBLESHOOTING_QUEUE -> PENDING. The audit event keeps the old and the new data.
CREATE OR REPLACE FUNCTION commandbus.operator_retry_v1(
    p_domain text, p_command_id uuid, p_operator text, p_reason text, p_data text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM commandbus._retry(
        commandbus._take(p_domain, p_command_id, 'retry', '{IN_TROUBLESHOOTING_QUEUE}'),
        p_operator, p_reason, p_data);
END $$;
