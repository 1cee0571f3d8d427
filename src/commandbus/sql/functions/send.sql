-- send_v1: accepts commands. Durable when the caller's transaction commits.
-- p_commands: [{domain, command_id, command_type, data, headers, correlation_id, reply_to, max_attempts, delay (seconds),
-- priority, minted}, ...]. Without command_id one is made. One that is given is looked up in history too, unless
-- minted: the library has made it for this very call.
-- p_lock_timeout (milliseconds): so that a flush of many callers' commands does not wait for the rival of one.
-- (sent) -> PENDING | SCHEDULED. An answer a row, in order: accepted, duplicate (same type and data as first
-- sent; nothing is written) or conflict (not the same; nothing is written).
-- Locks: waits for an uncommitted command of the same id; ids in order.
-- Raises CB001 bad input, CB004 an own id above READ COMMITTED, 40001 try again, 55P03 the lock timeout.
--
-- An own id is inserted first and looked up in history by a later statement. That is right also while the
-- command moves to history; looking first is not. A later statement sees what the earlier one waited for only
-- at READ COMMITTED: at REPEATABLE READ the same code accepted an id twice.
CREATE OR REPLACE FUNCTION commandbus.send_v1(p_commands text, p_lock_timeout integer DEFAULT NULL)
RETURNS TABLE (ordinal integer, command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT s.* FROM commandbus._send(p_commands, p_lock_timeout) s;
END $$;

-- _send: does that. p_batch_id: the batch of all of them, in whose counts the caller puts them.
CREATE OR REPLACE FUNCTION commandbus._send(
    p_commands text, p_lock_timeout integer DEFAULT NULL, p_batch_id uuid DEFAULT NULL)
RETURNS TABLE (ordinal integer, command_id uuid, outcome text)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now     timestamptz := commandbus.clock();
    v_odd     CONSTANT text := '[^A-Za-z0-9_.:-]';  -- in a name; 0.1 us to look for, '^[...]{1,128}$' takes 2.5 us
    v_longest CONSTANT double precision := 315360000;  -- seconds: ten years
    r         record;
BEGIN
    IF p_lock_timeout IS NOT NULL THEN
        PERFORM set_config('lock_timeout', p_lock_timeout::text, true);
    END IF;
    FOR r IN
        WITH given AS MATERIALIZED (
            SELECT g.n, g.domain, coalesce(g.command_id, gen_random_uuid()) AS command_id, g.command_type, g.data,
                   coalesce(g.headers, '{}') AS headers, g.correlation_id, g.reply_to, g.max_attempts,
                   coalesce(g.priority, 0::smallint) AS priority,
                   g.command_id IS NOT NULL AND NOT coalesce(g.minted, false) AS own_id,
                   CASE WHEN g.delay BETWEEN 0 AND v_longest
                        THEN v_now + make_interval(secs => g.delay) END AS not_before,
                   CASE WHEN (length(g.domain) BETWEEN 1 AND 128 AND g.domain !~ v_odd) IS NOT TRUE THEN 'domain'
                        WHEN (length(g.command_type) BETWEEN 1 AND 128 AND g.command_type !~ v_odd) IS NOT TRUE
                        THEN 'command_type'
                        WHEN octet_length(g.data_text) > 1024  -- no setting is lower; looking it up takes 10 us
                         AND octet_length(g.data_text) > coalesce((SELECT s.value::integer FROM commandbus.setting s
                                                                   WHERE s.name = 'max_data_bytes'), 262144)
                          OR octet_length(g.data_text) > 128  -- 65 levels have 130
                         AND jsonb_path_exists(g.data,
                                 'strict $.**{64} ? (@.type() == "object" || @.type() == "array")') THEN 'data'
                        WHEN jsonb_typeof(g.headers) <> 'object' OR octet_length(g.headers::text) > 8192
                          OR jsonb_path_exists(g.headers, 'strict $.* ? (@.type() != "string")') THEN 'headers'
                        WHEN length(g.correlation_id) > 256 THEN 'correlation_id'
                        WHEN (length(g.reply_to) NOT BETWEEN 1 AND 128 OR g.reply_to ~ v_odd)
                         AND g.reply_to !~ '^[?][0-9a-f]{32}$' THEN 'reply_to'  -- nor the address of a bus
                        WHEN g.priority NOT BETWEEN -100 AND 100 THEN 'priority'
                        WHEN g.max_attempts NOT BETWEEN 1 AND 1000000 THEN 'max_attempts'
                        WHEN g.delay NOT BETWEEN 0 AND v_longest THEN 'delay' END AS wrong,
                   sha256(convert_to(g.command_type || ' ' || g.data_text, 'UTF8')) AS data_hash
            FROM (SELECT f.domain, f.command_id, f.command_type, coalesce(f.data, 'null') AS data,
                         coalesce(f.data, 'null')::text AS data_text, f.headers, f.correlation_id, f.reply_to,
                         f.max_attempts, f.delay, f.priority, f.minted, f.n
                  FROM ROWS FROM (json_to_recordset(p_commands::json) AS
                      (domain text, command_id uuid, command_type text, data jsonb, headers jsonb,
                       correlation_id text, reply_to text, max_attempts integer, delay double precision,
                       priority smallint, minted boolean))
                       WITH ORDINALITY AS f(domain, command_id, command_type, data, headers, correlation_id, reply_to,
                                            max_attempts, delay, priority, minted, n)
                  OFFSET 0) g  -- or the text would be made twice
        ), inserted AS (
            INSERT INTO commandbus.command AS c
                (domain, command_id, command_type, status, place, due_at, priority, max_attempts, sent_at,
                 not_before, correlation_id, reply_to, batch_id, data_hash, data, headers)
            SELECT g.domain, g.command_id, g.command_type,
                   CASE WHEN g.not_before > v_now THEN 'SCHEDULED' ELSE 'PENDING' END,
                   CASE WHEN g.not_before > v_now THEN NULL ELSE commandbus._place(g.priority) END,
                   CASE WHEN g.not_before > v_now THEN g.not_before END,
                   g.priority, g.max_attempts, v_now, g.not_before, g.correlation_id, g.reply_to, p_batch_id,
                   g.data_hash, g.data, g.headers
            FROM given g WHERE g.wrong IS NULL ORDER BY g.domain, g.command_id, g.n
            ON CONFLICT (domain, command_id) DO NOTHING
            RETURNING c.domain, c.command_id
        )
        SELECT g.n, g.domain, g.command_id, g.data_hash, g.own_id, g.wrong, i.command_id IS NOT NULL
               AND (NOT g.own_id OR g.n = min(g.n) OVER (PARTITION BY g.domain, g.command_id)) AS fresh
        FROM given g LEFT JOIN inserted i ON i.domain = g.domain AND i.command_id = g.command_id
        ORDER BY g.n
    LOOP
        IF r.wrong IS NOT NULL THEN
            RAISE EXCEPTION 'command %: % is missing or out of bounds', r.command_id, r.wrong
                USING ERRCODE = 'CB001', HINT = CASE r.wrong
                    WHEN 'data' THEN 'Nothing was sent; it may have max_data_bytes (' || (SELECT l.max_data_bytes
                        FROM commandbus.limits_v1() l) || ') as text and 64 levels.'
                    WHEN 'headers' THEN 'Nothing was sent; give an object of strings, of at most 8192 bytes as text.'
                    ELSE 'Nothing was sent; correct the field.' END;
        END IF;
        ordinal := r.n;
        command_id := r.command_id;
        IF r.fresh AND NOT r.own_id THEN
            outcome := 'accepted';
        ELSE
            outcome := commandbus._settle_own_id(r.domain, r.command_id, r.data_hash, r.fresh);
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

-- _settle_own_id: what becomes of an id of the caller's own, after the insert was tried. Raises CB004 and 40001.
-- p_fresh: the insert put it in; it is taken out again when history knows the id.
-- A duplicate must be as durable as what was accepted, so that something has to be written: a commit that has written
-- nothing waits neither for the disk nor for a synchronous standby. When a sender's backend was ended as it waited for
-- the standby, its command is there to see before the standby has it; sent again, it was acknowledged, and lost with
-- the primary. The message is a WAL record and nothing else.
CREATE OR REPLACE FUNCTION commandbus._settle_own_id(p_domain text, p_id uuid, p_hash bytea, p_fresh boolean)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_hash bytea;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'command %: an id of your own can be sent at READ COMMITTED only', p_id
            USING ERRCODE = 'CB004', HINT = 'Let the library make the id, or send in a READ COMMITTED transaction.';
    END IF;
    IF NOT p_fresh THEN
        SELECT c.data_hash INTO v_hash FROM commandbus.command c WHERE c.domain = p_domain AND c.command_id = p_id;
    END IF;
    IF v_hash IS NULL THEN
        SELECT h.data_hash INTO v_hash FROM commandbus.command_history h
        WHERE h.domain = p_domain AND h.command_id = p_id LIMIT 1;
    END IF;
    IF v_hash IS NULL THEN
        IF p_fresh THEN
            RETURN 'accepted';
        END IF;
        RAISE EXCEPTION 'command %: its predecessor left while it was sent', p_id USING ERRCODE = '40001';
    END IF;
    IF p_fresh THEN
        DELETE FROM commandbus.command c WHERE c.domain = p_domain AND c.command_id = p_id;
    ELSE
        PERFORM pg_logical_emit_message(true, 'commandbus', '');
    END IF;
    RETURN CASE WHEN v_hash = p_hash THEN 'duplicate' ELSE 'conflict' END;
END $$;
