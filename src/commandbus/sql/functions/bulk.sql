-- Many parked commands at once: how they are grouped, and the verbs of the operator on some hundreds in one call.

-- _fingerprint: what failures of one kind have in common: a hash of the code, and of the message without what varies
-- (UUIDs, text in quotes, hexadecimal words, numbers). Of the first 1,000 characters only: a message may be long, and
-- a quote that was cut open there ends with them. 14 us for one of 150; with a lookahead for the digit it took 28.
-- from -> to: none. Locks: none. Raises nothing.
CREATE OR REPLACE FUNCTION commandbus._fingerprint(p_error jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN left(encode(sha256(convert_to(
        coalesce(p_error ->> 'code', '') || E'\n' || regexp_replace(
            left(coalesce(p_error ->> 'message', ''), 1000),
            '[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}'
            || '|"[^"]*("|$)|`[^`]*(`|$)|(?<!\w)''[^'']*(''(?!\w)|$)'
            || '|\m(0x)?[0-9a-f]*\d[0-9a-f]*\M|[-+]?\d+([.,:]\d+)*',
            '?', 'gi'), 'UTF8')), 'hex'), 12);
END $$;

-- _merge_patch: RFC 7396: the members of the patch in place of those of the target; null takes a member away, and a
-- patch that is no object replaces all.
-- from -> to: none. Locks: none. Raises nothing.
CREATE OR REPLACE FUNCTION commandbus._merge_patch(p_target jsonb, p_patch jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    v_merged jsonb := CASE jsonb_typeof(p_target) WHEN 'object' THEN p_target ELSE '{}' END;
    m        record;
BEGIN
    IF jsonb_typeof(p_patch) <> 'object' THEN
        RETURN p_patch;
    END IF;
    FOR m IN SELECT e.key, e.value FROM jsonb_each(p_patch) e LOOP
        IF m.value = 'null' THEN
            v_merged := v_merged - m.key;
        ELSE
            v_merged := v_merged || jsonb_build_object(m.key, commandbus._merge_patch(v_merged -> m.key, m.value));
        END IF;
    END LOOP;
    RETURN v_merged;
END $$;

-- operator_bulk_v1: one verb of the operator (retry, replace, cancel, complete) on parked commands as the operator saw
-- them. p_items: [{command_id, delivery}, ...]: what is parked anew has a higher delivery. p_value, JSON text or null:
-- for retry a merge patch of the data, for replace, which is a retry too, the data; for complete the result. A row an
-- item: done; changed (not parked any more, or anew); busy (somebody has locked it: try again); refused (its new data
-- would break a limit; it holds up no other).
-- IN_TROUBLESHOOTING_QUEUE -> PENDING, CANCELED or COMPLETED, as operator_retry_v1 and its neighbours do it.
-- Locks: the rows in id order, never waiting for one; then their events. Raises CB001 for another verb, an operator
-- without a name, a patch that is no object or a result that breaks a limit; nothing is written then.
CREATE OR REPLACE FUNCTION commandbus.operator_bulk_v1(
    p_domain text, p_verb text, p_items text, p_operator text, p_reason text, p_value text DEFAULT NULL)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_command   commandbus.command;
    v_value     jsonb := p_value;
    v_data      jsonb;
    v_max_bytes integer := (SELECT l.max_data_bytes FROM commandbus.limits_v1() l);
    i           record;
BEGIN
    IF p_verb IS NULL OR p_verb NOT IN ('retry', 'replace', 'cancel', 'complete') THEN
        RAISE EXCEPTION 'no verb of an operator: %', coalesce(p_verb, 'null')
            USING ERRCODE = 'CB001', HINT = 'Nothing was written; it is retry, replace, cancel or complete.';
    ELSIF coalesce(p_operator, '') = '' THEN
        RAISE EXCEPTION 'the operator has no name'
            USING ERRCODE = 'CB001', HINT = 'Say who acts; the audit trail keeps it.';
    END IF;
    IF p_verb = 'retry' AND jsonb_typeof(v_value) <> 'object' THEN
        RAISE EXCEPTION 'the patch is a JSON %', jsonb_typeof(v_value)
            USING ERRCODE = 'CB001', HINT = 'Nothing was written; a merge patch of data is an object.';
    END IF;
    FOR i IN SELECT * FROM json_to_recordset(p_items::json) AS i(command_id uuid, delivery bigint)
             ORDER BY i.command_id LOOP
        command_id := i.command_id;
        SELECT c.* INTO v_command FROM commandbus.command c
        WHERE c.domain = p_domain AND c.command_id = i.command_id AND c.delivery = i.delivery
          AND c.status = 'IN_TROUBLESHOOTING_QUEUE' LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            outcome := 'done';
            CASE p_verb
            WHEN 'retry', 'replace' THEN
                v_data := CASE WHEN p_verb = 'replace' OR v_value IS NULL THEN v_value
                               ELSE commandbus._merge_patch(v_command.data, v_value) END;
                IF commandbus._in_bounds(v_data, v_max_bytes) IS FALSE THEN
                    outcome := 'refused';
                ELSE
                    PERFORM commandbus._retry(v_command, p_operator, p_reason, v_data::text);
                END IF;
            WHEN 'cancel' THEN
                PERFORM commandbus._end(v_command, 'OPERATOR_CANCELED', 'CANCELED', p_operator, p_reason);
            WHEN 'complete' THEN
                PERFORM commandbus._end(v_command, 'OPERATOR_COMPLETED', 'COMPLETED', p_operator, p_reason, p_value);
            END CASE;
        ELSIF EXISTS (SELECT FROM commandbus.command c
                      WHERE c.domain = p_domain AND c.command_id = i.command_id AND c.delivery = i.delivery
                        AND c.status = 'IN_TROUBLESHOOTING_QUEUE') THEN
            outcome := 'busy';
        ELSE
            outcome := 'changed';
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;
