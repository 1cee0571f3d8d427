-- The weeks of the history: made ahead, dropped when their time is over.

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

-- drop_expired_v1: drops the weeks that ended before the retention began; a row for each. Batches and processes leave by
-- rows, some a call.
-- Locks: ACCESS EXCLUSIVE on the two parents and the week, waited for at most 50 ms (behind a longer wait, sends
-- elsewhere waited 1.8 s). Who holds it instead is told in blocked_by (process ids), and the week stays: call again.
CREATE OR REPLACE FUNCTION commandbus.drop_expired_v1() RETURNS TABLE (week text, blocked_by integer[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    v_oldest timestamptz := commandbus.clock()
        - (SELECT s.value::interval FROM commandbus.setting s WHERE s.name = 'retention');
    v_suffix text;
BEGIN
    PERFORM commandbus._drop_batches(v_oldest);
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
    PERFORM commandbus._drop_processes(v_oldest);
END $$;

-- _drop_processes: takes out finished processes whose retention is over, with their steps; at most 10,000 a call.
CREATE OR REPLACE FUNCTION commandbus._drop_processes(p_oldest timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    WITH gone AS (
        DELETE FROM commandbus.process t WHERE t.ctid = ANY (ARRAY(
            SELECT q.ctid FROM commandbus.process q WHERE q.finished_at < p_oldest
            ORDER BY q.finished_at LIMIT 10000 FOR UPDATE SKIP LOCKED))
        RETURNING t.domain, t.process_id
    )
    DELETE FROM commandbus.process_step s USING gone g WHERE s.domain = g.domain AND s.process_id = g.process_id;
END $$;
