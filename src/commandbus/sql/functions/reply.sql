-- Where outcomes go: to a domain, as a command, or to a process that waits, which is told to look. A reply is a command
-- like any other: type Reply, in the domain that reply_to names, sent in the transaction that ends its command. What is
-- parked has not ended, and sends none. A reply_to of "?" and 32 hexadecimal digits is the address of a bus.

-- _reply_id: the id of the reply to this command, which ended then. Ids of replies grow with time, as those that the
-- library makes; that one command cannot have two is for the primary key to see, and verify_v1 finds each by it.
CREATE OR REPLACE FUNCTION commandbus._reply_id(p_domain text, p_command_id text, p_finished_at timestamptz) RETURNS uuid
LANGUAGE sql STABLE AS $$
    SELECT encode(set_byte(set_byte(b.id, 6, get_byte(b.id, 6) & 15 | 112), 8, get_byte(b.id, 8) & 63 | 128),
                  'hex')::uuid
    FROM (SELECT overlay(sha256(convert_to(p_domain || ' ' || p_command_id || ' ' || m.at, 'UTF8'))
                         PLACING substring(int8send((m.at * 1000)::bigint) FROM 3) FROM 1 FOR 6) AS whole
          FROM (SELECT extract(epoch FROM p_finished_at) AS at) m) w
    CROSS JOIN LATERAL (SELECT substring(w.whole FOR 16) AS id) b
$$;

-- _reply_data: what a reply says.
CREATE OR REPLACE FUNCTION commandbus._reply_data(p_ended commandbus.command_history) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object('domain', p_ended.domain, 'command_id', p_ended.command_id,
                              'command_type', p_ended.command_type, 'status', p_ended.status,
                              'result', p_ended.result, 'error', p_ended.error)
$$;

-- _reply: sends the replies of these commands, which ended at p_finished_at and name a domain. (sent) -> PENDING.
-- p_sent_at: now, of one whose reply somebody has canceled and which is sent again; verify_v1 wants no other sent twice.
-- Locks: none that anybody holds. Not through send_v1: a result may be larger than what a sender is allowed.
CREATE OR REPLACE FUNCTION commandbus._reply(
    p_domain text, p_asked uuid[], p_finished_at timestamptz, p_sent_at timestamptz DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO commandbus.command
        (domain, command_id, command_type, status, place, priority, sent_at, correlation_id, data_hash, data, headers)
    SELECT h.reply_to, commandbus._reply_id(h.domain, h.command_id::text, d.sent_at), 'Reply', 'PENDING',
           commandbus._place(h.priority), h.priority, d.sent_at, h.correlation_id,
           commandbus._data_hash('Reply', d.data), d.data, h.headers
    FROM commandbus.command_history h
    CROSS JOIN LATERAL (
        SELECT commandbus._reply_data(h) AS data, coalesce(p_sent_at, p_finished_at) AS sent_at OFFSET 0) d
    WHERE h.domain = p_domain AND h.command_id = ANY (p_asked) AND h.finished_at = p_finished_at
    ORDER BY h.reply_to, h.command_id;
END $$;

-- _tell_waiting: tells the buses at these addresses, each of which waits for the command beside it, that it has ended.
-- Locks: NOTIFY's, from the commit on, which lets one such commit pass at a time. No notification is worth an ending: a
-- commit fails when their queue is full, because some session that listens never ends its transaction, so that from
-- half full on there is none. Who waits looks as well.
CREATE OR REPLACE FUNCTION commandbus._tell_waiting(p_commands uuid[], p_addresses text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF pg_notification_queue_usage() < 0.5 THEN
        PERFORM pg_notify('commandbus' || t.address, t.ids)
        FROM (SELECT w.address, string_agg(w.command_id::text, ' ') AS ids
              FROM (SELECT a.address, a.command_id, row_number() OVER (PARTITION BY a.address) / 200 AS page
                    FROM unnest(p_commands, p_addresses) AS a (command_id, address)) w
              GROUP BY w.address, w.page) t;  -- its 8,000 bytes hold 216 ids
    END IF;
END $$;

-- outcomes_v1: how these commands ended. p_items: [{domain, command_id, parked}, ...]. A row for each that has ended; for
-- one that is parked, if parked says so; and for one that is not there, without a status. None for what goes on.
-- Who knows the id of a command may ask for its outcome, which holds what its handler returned; nobody is told its data.
-- from -> to: none. Locks: none; STABLE, so that a command that moves meanwhile is seen once.
CREATE OR REPLACE FUNCTION commandbus.outcomes_v1(p_items text)
RETURNS TABLE (domain text, command_id uuid, command_type text, status text, result text, error text,
               correlation_id text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT i.domain, i.command_id, f.command_type, f.status, f.result::text, f.error::text, f.correlation_id
    FROM json_to_recordset(p_items::json) AS i(domain text, command_id uuid, parked boolean)
    LEFT JOIN LATERAL (
        SELECT c.command_type, c.status, c.result, c.error, c.correlation_id
        FROM commandbus.commands c WHERE c.domain = i.domain AND c.command_id = i.command_id LIMIT 1) f ON true
    WHERE f.status IS NULL OR f.status IN ('COMPLETED', 'FAILED', 'CANCELED')
       OR f.status = 'IN_TROUBLESHOOTING_QUEUE' AND i.parked;
END $$;
