CREATE OR REPLACE FUNCTION commandbus.send_v1(p_commands text, p_lock_timeout integer DEFAULT NULL)
RETURNS TABLE (ordinal integer, command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now     timestamptz := commandbus.clock();
    v_name    CONSTANT text := '^[A-Za-z0-9_.:-]{1,128}$';
    v_longest CONSTANT double precision := 315360000;  -- seconds: ten years
    v_count integer;
BEGIN
    IF p_lock_timeout IS NOT NULL THEN
        PERFORM set_config('lock_timeout', p_lock_timeout::text, true);
    END IF;
INSERT INTO commandbus.command AS c
                (domain, command_id, command_type, status, place, due_at, priority, max_attempts, sent_at,
                 not_before, correlation_id, reply_to, data_hash, data, headers)
            SELECT g.domain, coalesce(g.command_id, gen_random_uuid()), g.command_type,
                   CASE WHEN g.delay > 0 THEN 'SCHEDULED' ELSE 'PENDING' END,
                   CASE WHEN g.delay > 0 THEN NULL ELSE commandbus._place(g.priority) END,
                   CASE WHEN g.delay > 0 THEN v_now + make_interval(secs => g.delay) END,
                   g.priority, g.max_attempts, v_now, v_now + make_interval(secs => g.delay), g.correlation_id, g.reply_to,
                   sha256(convert_to(g.command_type || ' ' || g.data_text, 'UTF8')), g.data, g.headers
            FROM (SELECT f.domain, f.command_id, f.command_type, coalesce(f.data, 'null') AS data,
                         coalesce(f.data, 'null')::text AS data_text, coalesce(f.headers,'{}') headers, f.correlation_id, f.reply_to,
                         f.max_attempts, f.delay, coalesce(f.priority,0::smallint) as priority, f.minted, f.n
                  FROM ROWS FROM (json_to_recordset(p_commands::json) AS
                      (domain text, command_id uuid, command_type text, data jsonb, headers jsonb,
                       correlation_id text, reply_to text, max_attempts integer, delay double precision,
                       priority smallint, minted boolean))
                       WITH ORDINALITY AS f(domain, command_id, command_type, data, headers, correlation_id, reply_to,
                                            max_attempts, delay, priority, minted, n)
                  OFFSET 0) g WHERE NOT (jsonb_typeof(g.headers) <> 'object' OR octet_length(g.headers::text) > 8192
                          OR jsonb_path_exists(g.headers, 'strict $.* ? (@.type() != "string")'))
 ORDER BY g.domain, g.command_id, g.n ON CONFLICT (domain, command_id) DO NOTHING;
            GET DIAGNOSTICS v_count = ROW_COUNT;

    RETURN QUERY SELECT n, NULL::uuid, 'accepted' FROM generate_series(1, v_count) n;
END $$;
