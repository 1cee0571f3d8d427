-- The four roles and their rights. It is applied last, each time, in a database where roles were asked for once (the
-- setting 'roles'), so that what a later version adds is closed from its first moment on. Elsewhere it does nothing, and
-- PUBLIC may execute, as PostgreSQL has it.
--
-- Every right to the schema and to what is in it is taken from everybody but the owner, and then given by the list
-- below. ALTER DEFAULT PRIVILEGES would not do: for one schema it can only add to what PUBLIC has by default.
-- Functions are listed by name, and each signature of that name is found in the catalog: none can be misspelt or left
-- out, and nobody but the owner makes a function in this schema.
DO $$
DECLARE
    v_role text;
    v_what text;
    v_to   text;
BEGIN
    IF NOT EXISTS (SELECT FROM commandbus.setting s WHERE s.name = 'roles' AND s.value = 'on') THEN
        RETURN;
    END IF;
    -- Roles belong to the whole cluster: another database may have made them, or be about to.
    FOREACH v_role IN ARRAY '{commandbus_sender,commandbus_worker,commandbus_operator,commandbus_reader}'::text[] LOOP
        CONTINUE WHEN to_regrole(v_role) IS NOT NULL;
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', v_role);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;

    FOR v_what, v_to IN
        SELECT o.what, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM (SELECT 'SCHEMA commandbus', n.nspacl, n.nspowner FROM pg_namespace n WHERE n.nspname = 'commandbus'
              UNION ALL
              SELECT 'ROUTINE ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
              FROM pg_proc p WHERE p.pronamespace = 'commandbus'::regnamespace) AS o (what, acl, owner)
        CROSS JOIN aclexplode(o.acl) a WHERE a.grantee <> o.owner
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', v_what, v_to);
    END LOOP;
    PERFORM commandbus._close(c.oid) FROM pg_class c
    WHERE c.relnamespace = 'commandbus'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S');

    GRANT USAGE ON SCHEMA commandbus TO commandbus_sender, commandbus_worker, commandbus_operator, commandbus_reader;
    FOR v_what, v_to IN
        SELECT o.what, regexp_replace(r.roles, '(\w+)', 'commandbus_\1', 'g')
        FROM (VALUES
            ('schema_v1',            'sender, worker, operator, reader'),  -- every bus calls these three when it opens
            ('make_partitions_v1',   'sender, worker, operator, reader'),
            ('limits_v1',            'sender, worker, operator, reader'),
            ('send_v1',              'sender'),
            ('create_batch_v1',      'sender'),
            ('add_to_batch_v1',      'sender'),
            ('close_batch_v1',       'sender, operator'),
            ('batches',              'sender, operator, reader'),  -- without payloads
            ('batch_commands',       'operator, reader'),
            ('cancel_bulk_v1',       'sender, operator'),
            ('wake_v1',              'sender, worker, operator'),  -- a worker pings itself by it
            ('start_process_v1',     'sender'),
            ('cancel_v1',            'sender, operator'),  -- who sent a command and kept its id may withdraw it
            ('claim_v1',             'worker'),
            ('work_v1',              'worker'),
            ('renew_v1',             'worker'),
            ('complete_v1',          'worker'),
            ('fail_v1',              'worker'),
            ('release_v1',           'worker'),
            ('announce_v1',          'worker'),
            ('leave_v1',             'worker'),
            ('drop_expired_v1',      'worker'),
            ('drop_finished_v1',     'worker'),
            ('take_reply_v1',        'worker'),
            ('advance_process_v1',   'worker'),  -- sends the steps that follow
            ('retry_process_v1',     'operator'),
            ('cancel_process_v1',    'operator'),
            ('resume_process_v1',    'operator'),
            ('operator_retry_v1',    'operator'),
            ('operator_cancel_v1',   'operator'),
            ('operator_complete_v1', 'operator'),
            ('operator_bulk_v1',     'operator'),
            ('outcomes_v1',          'sender, operator, reader'),  -- who sent a command and kept its id may wait for it
            ('explain_v1',           'operator, reader'),
            ('verify_v1',            'operator, reader'),
            ('commands',             'operator, reader'),  -- payloads; a sender need not see those of others
            ('troubleshooting',      'operator, reader'),
            ('audit_trail',          'operator, reader'),
            ('workers',              'operator, reader'),
            ('processes',            'operator, reader'),
            ('process_steps',        'operator, reader'),
            ('clock',                'operator, reader'),  -- this and the next: called by views, as their reader
            ('_fingerprint',         'operator, reader'),
            ('stats',                'operator, reader')
        ) AS r (name, roles)
        JOIN (SELECT p.proname, 'EXECUTE ON ROUTINE ' || p.oid::regprocedure
              FROM pg_proc p WHERE p.pronamespace = 'commandbus'::regnamespace
              UNION ALL
              SELECT c.relname, 'SELECT ON TABLE ' || c.oid::regclass
              FROM pg_class c WHERE c.relnamespace = 'commandbus'::regnamespace AND c.relkind = 'v'
             ) AS o (name, what) USING (name)
    LOOP
        EXECUTE format('GRANT %s TO %s', v_what, v_to);
    END LOOP;
END $$;
