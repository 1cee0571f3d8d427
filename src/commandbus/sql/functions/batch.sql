-- Batches: commands of one domain that are counted together, and the command that is sent when the last has ended.
--
-- Who ends a command counts it in the same transaction, in the row of its batch; the one that brings the last sends
-- what is to be sent then. Counting the rows instead would miss it: of 400 last two commands that ended at the same
-- moment, neither saw the other at READ COMMITTED in 341.
-- So all that end commands of a batch take turns at its row, from their counting to their commit. Behind somebody who
-- keeps it for longer than _turn allows, an application's own transaction for example, the change becomes a row of
-- its own, and nobody waits for longer. It counts as well, in the view, and is put into the batch by whoever counts
-- next, or by the next sweep. So the counts are right at any moment, and a batch may end a sweep later than its last
-- command. No wait is longer than _turn allows, so that the order in which batches are taken makes no deadlock.
--
-- Locks: commands, then batches. Counting takes FOR NO KEY UPDATE, adding FOR KEY SHARE, closing FOR UPDATE: additions
-- and counting pass each other, and closing waits for additions.

-- _turn: puts this change into its batch, which it locks and, with p_patient, waits for; whether it could. No wait in it
-- is longer than 100 ms, and a transaction waits in vain once: a call may end hundreds of commands, and somebody may keep
-- many batches. Whatever the bookkeeping of a batch fails of, it must not fail the end of a command, nor a
-- claim: there it is tried again by each sweep.
CREATE OR REPLACE FUNCTION commandbus._turn(p_change commandbus.batch_change, p_patient boolean) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    IF p_patient AND current_setting('commandbus.impatient', true) IS DISTINCT FROM 'on' THEN
        PERFORM FROM commandbus.batch t WHERE t.domain = p_change.domain AND t.batch_id = p_change.batch_id
        FOR NO KEY UPDATE;
    ELSE
        PERFORM set_config('lock_timeout', '1ms', true);
        PERFORM FROM commandbus.batch t WHERE t.domain = p_change.domain AND t.batch_id = p_change.batch_id
        FOR NO KEY UPDATE SKIP LOCKED;
    END IF;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM commandbus._settle(p_change);
    RETURN true;
EXCEPTION
    WHEN lock_not_available OR deadlock_detected THEN
        PERFORM set_config('commandbus.impatient', 'on', true);
        RETURN false;
    WHEN OTHERS THEN
        RAISE WARNING 'batch % cannot be counted yet: %', p_change.batch_id, SQLSTATE;
        RETURN false;
END $$;

-- _count: p_change more commands of these batches, each as often as it is named, are in this status.
-- Above READ COMMITTED a transaction cannot see what others have counted since it began: there it leaves a row.
CREATE OR REPLACE FUNCTION commandbus._count(
    p_domain text, p_batches uuid[], p_status text, p_change integer DEFAULT 1) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_alone CONSTANT boolean :=
        current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted');
    v_more  commandbus.batch_change;
    b       record;
BEGIN
    FOR b IN SELECT n.batch_id, count(*)::integer * p_change AS more FROM unnest(p_batches) AS n (batch_id)
             WHERE n.batch_id IS NOT NULL GROUP BY 1 ORDER BY 1 LOOP
        v_more := (p_domain, b.batch_id, 0,
                   CASE p_status WHEN 'COMPLETED' THEN b.more ELSE 0 END,
                   CASE p_status WHEN 'FAILED' THEN b.more ELSE 0 END,
                   CASE p_status WHEN 'CANCELED' THEN b.more ELSE 0 END,
                   CASE p_status WHEN 'IN_TROUBLESHOOTING_QUEUE' THEN b.more ELSE 0 END);
        IF v_alone OR NOT commandbus._turn(v_more, true) THEN
            INSERT INTO commandbus.batch_change SELECT v_more.*;
        END IF;
    END LOOP;
END $$;

-- _settle: puts this change, and all that wait, into a batch that the caller has locked; finishes it if all has ended.
CREATE OR REPLACE FUNCTION commandbus._settle(p_change commandbus.batch_change) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_on_complete jsonb;
BEGIN
    IF EXISTS (SELECT FROM commandbus.batch_change w
               WHERE w.domain = p_change.domain AND w.batch_id = p_change.batch_id) THEN
        WITH gone AS (
            DELETE FROM commandbus.batch_change w
            WHERE w.domain = p_change.domain AND w.batch_id = p_change.batch_id RETURNING w.*
        )
        SELECT p_change.total + sum(g.total), p_change.completed + sum(g.completed), p_change.failed + sum(g.failed),
               p_change.canceled + sum(g.canceled), p_change.parked + sum(g.parked)
          INTO p_change.total, p_change.completed, p_change.failed, p_change.canceled, p_change.parked FROM gone g;
    END IF;
    UPDATE commandbus.batch AS t
    SET total = t.total + p_change.total, completed = t.completed + p_change.completed,
        failed = t.failed + p_change.failed, canceled = t.canceled + p_change.canceled,
        parked = t.parked + p_change.parked,
        finished_at = CASE WHEN NOT t.growing
                            AND t.completed + t.failed + t.canceled
                                + p_change.completed + p_change.failed + p_change.canceled = t.total + p_change.total
                           THEN commandbus.clock() END
    WHERE t.domain = p_change.domain AND t.batch_id = p_change.batch_id AND t.finished_at IS NULL
    RETURNING CASE WHEN t.finished_at IS NOT NULL THEN t.on_complete END INTO v_on_complete;
    IF v_on_complete IS NOT NULL THEN
        PERFORM commandbus._send_prepared(v_on_complete);
    END IF;
END $$;

-- _settle_all: puts in what waits, of batches that nobody keeps: what no later counting would. One that fails holds up
-- no other. Locks: those batches, never waiting for one.
CREATE OR REPLACE FUNCTION commandbus._settle_all(p_domain text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_batch_id uuid;
BEGIN
    FOR v_batch_id IN
        SELECT t.batch_id FROM commandbus.batch t
        WHERE t.domain = p_domain AND t.batch_id = ANY (ARRAY(
            SELECT DISTINCT w.batch_id FROM commandbus.batch_change w WHERE w.domain = p_domain))
        ORDER BY t.batch_id LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        PERFORM commandbus._turn((p_domain, v_batch_id, 0, 0, 0, 0, 0)::commandbus.batch_change, false);
    END LOOP;
END $$;

-- _prepare: what is needed to send this command (as send_v1 takes it) later, when nothing may refuse it any more.
-- It is sent now and taken out again, so that it is checked as all are. Null for null. Raises CB001.
CREATE OR REPLACE FUNCTION commandbus._prepare(p_command jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_id       uuid;
    v_prepared jsonb;
BEGIN
    IF p_command IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT s.command_id INTO v_id
      FROM commandbus._send(jsonb_build_array(p_command - 'command_id')::text) s;
    DELETE FROM commandbus.command c WHERE c.domain = p_command ->> 'domain' AND c.command_id = v_id
    RETURNING to_jsonb(c) INTO v_prepared;
    RETURN v_prepared;
END $$;

-- _send_prepared: (sent) -> PENDING | SCHEDULED, as if it were sent now. Its id could be seen before: if somebody has sent
-- a command under it meanwhile, that remains the only one, as with send_v1. Locks: waits for an uncommitted command of the
-- same id. Raises 40001 when that leaves just then.
CREATE OR REPLACE FUNCTION commandbus._send_prepared(p_prepared jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_now     timestamptz := commandbus.clock();
    v_command commandbus.command := jsonb_populate_record(NULL::commandbus.command, p_prepared);
BEGIN
    v_command.not_before := v_now + (v_command.not_before - v_command.sent_at);
    v_command.sent_at := v_now;
    IF v_command.status = 'SCHEDULED' THEN
        v_command.due_at := v_command.not_before;
    ELSE
        v_command.place := commandbus._place(v_command.priority);
    END IF;
    INSERT INTO commandbus.command
        (domain, command_id, command_type, status, place, due_at, priority, max_attempts, sent_at, not_before,
         correlation_id, reply_to, data_hash, data, headers)
    SELECT v_command.domain, v_command.command_id, v_command.command_type, v_command.status, v_command.place,
           v_command.due_at, v_command.priority, v_command.max_attempts, v_command.sent_at, v_command.not_before,
           v_command.correlation_id, v_command.reply_to, v_command.data_hash,
           coalesce(v_command.data, 'null'), v_command.headers  -- a record cannot tell null of JSON from none
    ON CONFLICT (domain, command_id) DO NOTHING;
    PERFORM commandbus._settle_own_id(v_command.domain, v_command.command_id, v_command.data_hash, FOUND);
END $$;

-- create_batch_v1: an empty batch that grows. Answers accepted, duplicate (there is one of this id and hash; nothing is
-- written) or conflict (with another hash; nothing is written). p_on_complete: a command as send_v1 takes it, which is
-- sent when the batch finishes; its id is made here, and its correlation id, if it has none, is the batch's id.
-- Locks: waits for an uncommitted batch of the same id. Raises CB001 bad input.
CREATE OR REPLACE FUNCTION commandbus.create_batch_v1(
    p_domain text, p_batch_id uuid, p_name text, p_on_complete text, p_hash text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_hash text;
BEGIN
    IF (p_domain ~ '^[A-Za-z0-9_.:-]{1,128}$' AND length(coalesce(p_name, '-')) BETWEEN 1 AND 256) IS NOT TRUE THEN
        RAISE EXCEPTION 'batch %: its domain or its name is missing or out of bounds', p_batch_id
            USING ERRCODE = 'CB001', HINT = 'Nothing was written; correct the field.';
    END IF;
    INSERT INTO commandbus.batch (domain, batch_id, name, on_complete, hash, created_at)
    VALUES (p_domain, p_batch_id, p_name, commandbus._prepare(
        jsonb_build_object('correlation_id', p_batch_id) || p_on_complete::jsonb), p_hash, commandbus.clock())
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN 'accepted';
    END IF;
    SELECT t.hash INTO v_hash FROM commandbus.batch t WHERE t.domain = p_domain AND t.batch_id = p_batch_id;
    PERFORM pg_logical_emit_message(true, 'commandbus', '');  -- as for a command: see _settle_own_id
    RETURN CASE WHEN v_hash = p_hash THEN 'duplicate' ELSE 'conflict' END;
END $$;

-- add_to_batch_v1: sends commands of the batch's domain as send_v1 does, and puts them into the batch while it grows;
-- it has them, all that one transaction adds, once that commits. An answer a row, as of send_v1; what is not accepted
-- was sent before and is not put into the batch.
-- Locks: the batch, FOR KEY SHARE, so that it is not closed meanwhile; what send_v1 locks.
-- Raises CB003 the batch does not grow any more, CB005 no such batch, CB001 when a command is of another domain, and
-- what send_v1 raises.
CREATE OR REPLACE FUNCTION commandbus.add_to_batch_v1(p_domain text, p_batch_id uuid, p_commands text)
RETURNS TABLE (ordinal integer, command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_growing boolean;
    v_more    integer := 0;
BEGIN
    SELECT t.growing INTO v_growing FROM commandbus.batch t
    WHERE t.domain = p_domain AND t.batch_id = p_batch_id FOR KEY SHARE;
    IF v_growing IS NULL THEN
        PERFORM commandbus._no_batch(p_domain, p_batch_id);
    ELSIF NOT v_growing THEN
        RAISE EXCEPTION 'batch % is closed: nothing can be added', p_batch_id
            USING ERRCODE = 'CB003', HINT = 'Nothing was written; create another batch.';
    ELSIF EXISTS (SELECT FROM json_to_recordset(p_commands::json) AS c(domain text)
                  WHERE c.domain IS DISTINCT FROM p_domain) THEN
        RAISE EXCEPTION 'batch %: a command is of another domain', p_batch_id
            USING ERRCODE = 'CB001', HINT = 'Nothing was written; a batch has commands of one domain.';
    END IF;
    FOR ordinal, command_id, outcome IN SELECT s.* FROM commandbus._send(p_commands, NULL, p_batch_id) s LOOP
        IF outcome = 'accepted' THEN
            v_more := v_more + 1;
            INSERT INTO commandbus.batch_command VALUES (
                p_domain, p_batch_id, nextval('commandbus.command_seq'), command_id);
        END IF;
        RETURN NEXT;
    END LOOP;
    INSERT INTO commandbus.batch_change (domain, batch_id, total) VALUES (p_domain, p_batch_id, v_more);
END $$;

-- close_batch_v1: no more will be added: the batch finishes with its last command, now if all have ended. Closing twice
-- is no error. Locks: the batch, waited for up to 5 s: for those who add. Raises CB003 somebody adds for longer, CB004
-- above READ COMMITTED, where it would not see what was added since its transaction began, CB005; 40001 try again.
CREATE OR REPLACE FUNCTION commandbus.close_batch_v1(p_domain text, p_batch_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'batch % can be closed at READ COMMITTED only', p_batch_id
            USING ERRCODE = 'CB004', HINT = 'Nothing was written; close it in a READ COMMITTED transaction.';
    END IF;
    PERFORM FROM commandbus.batch t WHERE t.domain = p_domain AND t.batch_id = p_batch_id FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM commandbus._no_batch(p_domain, p_batch_id);
    END IF;
    UPDATE commandbus.batch AS t SET growing = false
    WHERE t.domain = p_domain AND t.batch_id = p_batch_id AND t.growing;
    PERFORM commandbus._settle((p_domain, p_batch_id, 0, 0, 0, 0, 0)::commandbus.batch_change);
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'batch % is kept by another transaction, which may be adding to it', p_batch_id
        USING ERRCODE = 'CB003', HINT = 'Nothing was written; try again when that transaction has ended.';
END $$;

-- _no_batch: raises CB005.
CREATE OR REPLACE FUNCTION commandbus._no_batch(p_domain text, p_batch_id uuid) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'batch % is not in domain "%"', p_batch_id, p_domain
        USING ERRCODE = 'CB005', HINT = 'Look at the id and the domain; retention drops finished batches.';
END $$;

-- cancel_bulk_v1: cancel_v1 for many. p_items: [{command_id}, ...]. A row an item: done; changed (it had ended before);
-- busy (somebody has locked it: try again). Any unfinished -> CANCELED; a running one loses its lease.
-- Locks: the rows in id order, never waiting for one; then their events, then their batches.
CREATE OR REPLACE FUNCTION commandbus.cancel_bulk_v1(p_domain text, p_items text, p_operator text, p_reason text)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    v_command commandbus.command;
BEGIN
    FOR command_id IN SELECT i.command_id FROM json_to_recordset(p_items::json) AS i(command_id uuid)
                      ORDER BY i.command_id LOOP
        SELECT c.* INTO v_command FROM commandbus.command c
        WHERE c.domain = p_domain AND c.command_id = cancel_bulk_v1.command_id LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            PERFORM commandbus._end(v_command, 'CANCELED', 'CANCELED', p_operator, p_reason);
            outcome := 'done';
        ELSIF EXISTS (SELECT FROM commandbus.command c
                      WHERE c.domain = p_domain AND c.command_id = cancel_bulk_v1.command_id) THEN
            outcome := 'busy';
        ELSE
            outcome := 'changed';
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;
