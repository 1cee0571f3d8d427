-- Where outcomes go. A reply is a command like any other: type Reply, in the domain that reply_to names, in the
-- transaction that ends its command. A reply_to that begins with "?" names a process that waits: it is told to look.

-- _reply: the replies of these finished commands. (sent) -> PENDING. Locks: none that anybody holds.
-- Not through send_v1: a result may be larger than what a sender is allowed.
CREATE OR REPLACE FUNCTION commandbus._reply(p_domain text, p_asked uuid[], p_finished_at timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    WITH finished AS (
        SELECT h.* FROM commandbus.command_history h
        WHERE h.domain = p_domain AND h.command_id = ANY (p_asked) AND h.finished_at = p_finished_at
    ), told AS (
        SELECT pg_notify('commandbus', f.reply_to) FROM (
            SELECT DISTINCT h.reply_to FROM finished h WHERE h.reply_to LIKE '?%') f
    ), reply AS (
        SELECT h.reply_to AS domain, h.correlation_id, h.headers, h.priority,
               jsonb_build_object('domain', h.domain, 'command_id', h.command_id, 'command_type', h.command_type,
                                  'status', h.status, 'result', h.result, 'error', h.error) AS data
        FROM finished h WHERE h.reply_to NOT LIKE '?%' AND (SELECT count(*) FROM told) >= 0
    )
    INSERT INTO commandbus.command
        (domain, command_id, command_type, status, place, priority, sent_at, correlation_id, data_hash, data, headers)
    SELECT r.domain, gen_random_uuid(), 'Reply', 'PENDING', commandbus._place(r.priority), r.priority, p_finished_at,
           r.correlation_id, sha256(convert_to('Reply ' || r.data::text, 'UTF8')), r.data, r.headers
    FROM reply r;
END $$;
