-- What verify_v1 says of batches; instead of a command it names the batch.

-- _verify_batches: what is wrong with batches: their counts are those of their commands, as far as these are kept; they
-- are finished when they must be, and what is sent then was sent. Who has seen its id may have sent it before; that it is
-- there once is for verify_v1 to see, as of any command. from -> to: none. Locks: none.
CREATE OR REPLACE FUNCTION commandbus._verify_batches()
RETURNS TABLE (violation text, domain text, command_id uuid, detail text)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH kept AS (
        SELECT k.domain, k.batch_id, count(*) FILTER (WHERE k.status = 'COMPLETED') AS completed,
               count(*) FILTER (WHERE k.status = 'FAILED') AS failed,
               count(*) FILTER (WHERE k.status = 'CANCELED') AS canceled,
               count(*) FILTER (WHERE k.status = 'IN_TROUBLESHOOTING_QUEUE') AS parked,
               count(*) FILTER (WHERE k.status IN ('PENDING', 'SCHEDULED', 'IN_PROGRESS')) AS open
        FROM (SELECT c.domain, c.batch_id, c.status FROM commandbus.command c WHERE c.batch_id IS NOT NULL
              UNION ALL
              SELECT h.domain, h.batch_id, h.status FROM commandbus.command_history h WHERE h.batch_id IS NOT NULL) k
        GROUP BY 1, 2
    ), late AS (
        SELECT w.domain, w.batch_id, sum(w.total) AS total, sum(w.completed) AS completed, sum(w.failed) AS failed,
               sum(w.canceled) AS canceled, sum(w.parked) AS parked
        FROM commandbus.batch_change w GROUP BY 1, 2
    ), listed AS (
        SELECT m.domain, m.batch_id, count(*) AS total FROM commandbus.batch_command m GROUP BY 1, 2
    ), week AS (
        SELECT min(to_date(right(i.inhrelid::regclass::text, 7), 'IYYY"w"IW'))::timestamp AT TIME ZONE 'UTC' AS oldest,
               commandbus.clock() - (SELECT s.value::interval FROM commandbus.setting s WHERE s.name = 'retention')
                   AS retained
        FROM pg_inherits i WHERE i.inhparent = 'commandbus.command_history'::regclass
    ), batch AS (
        SELECT b.domain, b.batch_id, b.growing, b.finished_at, b.on_complete, w.domain IS NULL AS settled,
               b.total + coalesce(w.total, 0) AS total, b.completed + coalesce(w.completed, 0) AS completed,
               b.failed + coalesce(w.failed, 0) AS failed, b.canceled + coalesce(w.canceled, 0) AS canceled,
               b.parked + coalesce(w.parked, 0) AS parked, k.oldest > b.created_at AS maybe_dropped,
               k.retained > b.finished_at AS expired
        FROM commandbus.batch b
        LEFT JOIN late w ON w.domain = b.domain AND w.batch_id = b.batch_id
        CROSS JOIN week k
    )
    SELECT v.violation, b.domain, b.batch_id, v.wrong
    FROM batch b
    LEFT JOIN kept k ON k.domain = b.domain AND k.batch_id = b.batch_id
    LEFT JOIN listed l ON l.domain = b.domain AND l.batch_id = b.batch_id
    CROSS JOIN LATERAL (
        SELECT b.completed + b.failed + b.canceled AS ended,
               ARRAY[b.completed - coalesce(k.completed, 0), b.failed - coalesce(k.failed, 0),
                     b.canceled - coalesce(k.canceled, 0)] AS gone,
               (SELECT count(*) FROM commandbus._kept() s
                WHERE s.domain = b.on_complete ->> 'domain' AND s.command_id = (b.on_complete ->> 'command_id')::uuid
               ) AS sent) n
    CROSS JOIN LATERAL (VALUES
        ('batch_counts', CASE WHEN b.parked <> coalesce(k.parked, 0)
                                OR b.total - n.ended - b.parked <> coalesce(k.open, 0)
                                OR 0 > ANY (n.gone) OR b.maybe_dropped IS NOT TRUE AND 0 < ANY (n.gone)
            THEN format('of its %s commands %s are completed, %s failed, %s canceled, %s parked by its counts, and '
                        '%s, %s, %s, %s by their rows', b.total, b.completed, b.failed, b.canceled, b.parked,
                        coalesce(k.completed, 0), coalesce(k.failed, 0), coalesce(k.canceled, 0),
                        coalesce(k.parked, 0)) END),
        ('batch_list', CASE WHEN coalesce(l.total, 0) <> b.total AND b.expired IS NOT TRUE
            THEN format('it has %s commands, and %s are listed', b.total, coalesce(l.total, 0)) END),
        ('batch_end', CASE WHEN b.finished_at IS NULL AND NOT b.growing AND b.settled AND n.ended = b.total
                           THEN 'all its commands have ended, and it has not'
                           WHEN b.finished_at IS NOT NULL AND (b.growing OR n.ended <> b.total)
                           THEN 'it has ended, and not all its commands have' END),
        ('batch_message', CASE WHEN b.on_complete IS NOT NULL AND b.finished_at IS NOT NULL AND n.sent = 0
                                AND b.maybe_dropped IS NOT TRUE
            THEN format('it has ended, and what is sent then, command %s, was not', b.on_complete ->> 'command_id') END)
    ) AS v (violation, wrong)
    WHERE v.wrong IS NOT NULL
    UNION ALL
    SELECT 'batch_unknown', o.domain, o.batch_id, 'something names this batch, which is not there'
    FROM (SELECT c.domain, c.batch_id FROM commandbus.command c WHERE c.batch_id IS NOT NULL
          UNION SELECT w.domain, w.batch_id FROM late w
          UNION SELECT l.domain, l.batch_id FROM listed l) o
    WHERE NOT EXISTS (SELECT FROM commandbus.batch b WHERE b.domain = o.domain AND b.batch_id = o.batch_id);
END $$;
