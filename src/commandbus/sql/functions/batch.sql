-- The counts of batches.

-- _count: adds one to a count of these batches for each time that it is named; the last of all finishes its batch,
-- and sends what is to be sent then. p_status: what the commands have become.
-- Locks: the batches, in id order, waited for; who counts holds them until it commits.
CREATE OR REPLACE FUNCTION commandbus._count(p_domain text, p_batches uuid[], p_status text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b record;
BEGIN
    FOR b IN SELECT n.batch_id, count(*)::integer AS more FROM unnest(p_batches) AS n (batch_id)
             GROUP BY 1 ORDER BY 1 LOOP
        UPDATE commandbus.batch AS t
        SET completed = t.completed + CASE p_status WHEN 'COMPLETED' THEN b.more ELSE 0 END,
            failed = t.failed + CASE p_status WHEN 'FAILED' THEN b.more ELSE 0 END,
            canceled = t.canceled + CASE p_status WHEN 'CANCELED' THEN b.more ELSE 0 END
        WHERE t.domain = p_domain AND t.batch_id = b.batch_id;
    END LOOP;
END $$;
