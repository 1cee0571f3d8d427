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
SELECT count(*), min(a),min(b),min(c),min(d) INTO v_count FROM unnest(array['a'],array['b'],array['b'],array['b']) e(a,b,c,d);
    RETURN QUERY SELECT n, NULL::uuid, 'accepted' FROM generate_series(1, v_count) n;
END $$;
