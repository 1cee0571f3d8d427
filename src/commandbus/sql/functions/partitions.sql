-- Retention. The weeks of the history: made ahead, dropped when their time is over. Batches and processes leave by rows.

-- _make_partition: makes sure that the week of this moment exists in both history tables.
-- Locks, only when the week is missing: SHARE UPDATE EXCLUSIVE on the two parents. ATTACH takes it, and lets sends and
-- completions pass, which CREATE ... PARTITION OF would not. It is no advisory lock, since taking one does not make
-- this session see that a rival has made the table meanwhile.
-- Weeks begin and end in UTC, whatever the session's time zone and date style are.
CREATE OR REPLACE FUNCTION commandbus._make_partition(p_at timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_week   timestamp := date_trunc('week', p_at AT TIME ZONE 'UTC');
    v_suffix text := to_char(v_week, 'IYYY"w"IW');
    v_iso    CONSTANT text := 'YYYY-MM-DD HH24:MI:SS"+00"';
    v_table  text;
BEGIN
    IF to_regclass('commandbus.audit_history_' || v_suffix) IS NOT NULL THEN
        RETURN;
    END IF;
    LOCK TABLE ONLY commandbus.command_history IN SHARE UPDATE EXCLUSIVE MODE;
    IF to_regclass('commandbus.audit_history_' || v_suffix) IS NOT NULL THEN
        RETURN;
    END IF;
    FOREACH v_table IN ARRAY ARRAY['command_history', 'audit_history'] LOOP
        EXECUTE format('CREATE TABLE commandbus.%I (LIKE commandbus.%I INCLUDING ALL)',
                       v_table || '_' || v_suffix, v_table);
        EXECUTE format('ALTER TABLE commandbus.%I ATTACH PARTITION commandbus.%I FOR VALUES FROM (%L) TO (%L)',
                       v_table, v_table || '_' || v_suffix,
                       to_char(v_week, v_iso), to_char(v_week + interval '7 days', v_iso));
        PERFORM commandbus._close(to_regclass('commandbus.' || v_table || '_' || v_suffix));
    END LOOP;
END $$;

-- _close: takes every right to this table, sequence or view from everybody but its owner, in a database with roles:
-- default privileges of the owner may have opened what was just made. Locks: none.
CREATE OR REPLACE FUNCTION commandbus._close(p_relation regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_to text;
BEGIN
    IF NOT EXISTS (SELECT FROM commandbus.setting s WHERE s.name = 'roles' AND s.value = 'on') THEN
        RETURN;
    END IF;
    FOR v_to IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM pg_class c
        CROSS JOIN LATERAL (SELECT c.relacl UNION ALL
                            SELECT t.attacl FROM pg_attribute t WHERE t.attrelid = c.oid) AS o (acl)
        CROSS JOIN aclexplode(o.acl) a
        WHERE c.oid = p_relation AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('REVOKE ALL ON TABLE %s FROM %s CASCADE', p_relation, v_to);
    END LOOP;
END $$;

-- make_partitions_v1: this week and the next four. Any worker or sender calls it; it costs five look-ups.
CREATE OR REPLACE FUNCTION commandbus.make_partitions_v1() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    FOR v_ahead IN 0..4 LOOP
        PERFORM commandbus._make_partition(commandbus.clock() + v_ahead * interval '168 hours');
    END LOOP;
END $$;

-- drop_expired_v1: drops the weeks that ended before the retention began; a row for each.
-- Locks: ACCESS EXCLUSIVE on the two parents and the week, waited for at most 50 ms (behind a longer wait, sends
-- elsewhere waited 1.8 s). Who holds it instead is told in blocked_by (process ids), and the week stays: call again.
CREATE OR REPLACE FUNCTION commandbus.drop_expired_v1() RETURNS TABLE (week text, blocked_by integer[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    v_oldest timestamptz := commandbus.clock()
        - (SELECT s.value::interval FROM commandbus.setting s WHERE s.name = 'retention');
    v_suffix text;
BEGIN
    FOR v_suffix IN
        SELECT substr(c.relname, length('command_history_') + 1)
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'commandbus.command_history'::regclass ORDER BY 1
    LOOP
        CONTINUE WHEN ((to_date(v_suffix, 'IYYY"w"IW') + 7)::timestamp AT TIME ZONE 'UTC' <= v_oldest) IS NOT TRUE;
        week := v_suffix;
        blocked_by := NULL;
        BEGIN
            EXECUTE format('DROP TABLE commandbus.%I, commandbus.%I',
                           'command_history_' || v_suffix, 'audit_history_' || v_suffix);
        EXCEPTION WHEN lock_not_available THEN
            blocked_by := ARRAY(
                SELECT DISTINCT l.pid FROM pg_locks l
                WHERE l.granted AND l.pid <> pg_backend_pid() AND l.relation IN (
                    'commandbus.command_history'::regclass, 'commandbus.audit_history'::regclass,
                    to_regclass('commandbus.command_history_' || v_suffix),
                    to_regclass('commandbus.audit_history_' || v_suffix)));
        END;
        RETURN NEXT;
    END LOOP;
END $$;

-- drop_finished_v1: takes out a portion of the batches and processes that finished before the retention began, the
-- oldest first, with their lists and steps: 10,000 rows, and what the last process has more. Whether it was a whole
-- portion: call again. 6 to 110 ms, and a call of its own, since drop_expired_v1 lets nobody pass until it commits.
-- The switches pin the two indexes on finished_at, in their order, and one probe each of the lists and steps.
-- Locks: those rows, never waiting for one.
CREATE OR REPLACE FUNCTION commandbus.drop_finished_v1() RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    v_oldest timestamptz := commandbus.clock()
        - (SELECT s.value::interval FROM commandbus.setting s WHERE s.name = 'retention');
    v_left   integer := 10000;
    v_gone   integer;
    t        record;
BEGIN
    FOR t IN SELECT b.domain, b.batch_id FROM commandbus.batch b WHERE b.finished_at < v_oldest
             ORDER BY b.finished_at FOR UPDATE SKIP LOCKED LOOP
        DELETE FROM commandbus.batch_command m WHERE m.ctid = ANY (ARRAY(
            SELECT n.ctid FROM commandbus.batch_command n
            WHERE n.domain = t.domain AND n.batch_id = t.batch_id LIMIT v_left));
        GET DIAGNOSTICS v_gone = ROW_COUNT;
        v_left := v_left - v_gone;
        EXIT WHEN v_left = 0;
        DELETE FROM commandbus.batch b WHERE b.domain = t.domain AND b.batch_id = t.batch_id;
        v_left := v_left - 1;
    END LOOP;
    FOR t IN SELECT p.domain, p.process_id FROM commandbus.process p WHERE p.finished_at < v_oldest
             ORDER BY p.finished_at FOR UPDATE SKIP LOCKED LOOP
        EXIT WHEN v_left <= 0;
        DELETE FROM commandbus.process_step s WHERE s.domain = t.domain AND s.process_id = t.process_id;
        GET DIAGNOSTICS v_gone = ROW_COUNT;
        DELETE FROM commandbus.process p WHERE p.domain = t.domain AND p.process_id = t.process_id;
        v_left := v_left - v_gone - 1;
    END LOOP;
    RETURN v_left <= 0;
END $$;
