-- The checker's part for processes: what take_reply_v1 and its neighbours cannot have left behind. See verify.sql. An
-- operator may cancel or complete a Reply or a Timer by hand: the process waits then, and that is no violation. In plpgsql, which looks for the
-- functions of verify.sql only when it runs.

-- _verify_processes: what is wrong with processes, each seen with its steps. In command_id stands the process.
CREATE OR REPLACE FUNCTION commandbus._verify_processes()
RETURNS TABLE (violation text, domain text, command_id uuid, detail text)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT v.violation, p.domain, p.process_id, v.wrong
    FROM commandbus.process p
    LEFT JOIN (
        SELECT s.domain, s.process_id, count(*) AS steps, count(s.applied) AS applied,
               coalesce(max(s.applied), 0) AS last_applied,
               count(*) FILTER (WHERE s.status = 'OPEN') AS open,
               count(*) FILTER (WHERE s.status = 'OPEN' AND s.kind IN ('step', 'wait')) AS awaited,
               count(*) FILTER (WHERE s.status = 'OPEN' AND s.kind IN ('step', 'undo')) AS undone,
               count(*) FILTER (WHERE s.kind = 'undo') AS undos,
               count(*) FILTER (WHERE s.kind = 'undo' AND s.status <> 'COMPLETED') AS failed_undos,
               count(*) FILTER (WHERE s.undo IS NOT NULL) AS to_undo,
               count(DISTINCT s.of_number) FILTER (WHERE s.kind = 'undo') AS undone_once
        FROM commandbus.process_step s GROUP BY s.domain, s.process_id) s
      ON s.domain = p.domain AND s.process_id = p.process_id
    CROSS JOIN LATERAL (VALUES
        ('process_steps', CASE WHEN p.steps <> coalesce(s.steps, 0)
            THEN format('it has sent %s commands, %s are kept', p.steps, coalesce(s.steps, 0)) END),
        ('process_revision', CASE WHEN (p.revision, p.revision) <> (coalesce(s.applied, 0), coalesce(s.last_applied, 0))
            THEN format('%s outcomes were applied, its revision is %s', coalesce(s.applied, 0), p.revision) END),
        ('process_open', CASE
            WHEN p.finished_at IS NOT NULL AND s.open > 0
                THEN format('it is %s, and %s of its steps are open', p.status, s.open)
            WHEN p.status = 'RUNNING' AND coalesce(s.awaited, 0) = 0
              OR p.status = 'COMPENSATING' AND coalesce(s.undone, 0) = 0
                THEN format('it is %s, and waits for nothing', p.status) END),
        ('process_end', CASE
            WHEN p.status IN ('RUNNING', 'COMPLETED') AND s.undos > 0
                THEN format('it is %s, and %s of its steps were undone', p.status, s.undos)
            WHEN s.undos <> s.undone_once THEN 'a step was undone twice'
            WHEN p.status IN ('COMPENSATED', 'FAILED') AND s.to_undo <> s.undone_once
                THEN format('it is %s, and %s of %s steps were undone', p.status, s.undone_once, s.to_undo)
            WHEN p.status IN ('COMPENSATED', 'FAILED') AND (p.status = 'FAILED') <> (s.failed_undos > 0)
                THEN format('it is %s, and %s undos failed', p.status, s.failed_undos) END)
    ) AS v (violation, wrong)
    WHERE v.wrong IS NOT NULL;
END $$;

-- _verify_steps: what is wrong with steps, each seen with its command and the reply of that. In command_id stands the
-- command of the step; one that finished before the retention may be gone.
CREATE OR REPLACE FUNCTION commandbus._verify_steps()
RETURNS TABLE (violation text, domain text, command_id uuid, detail text)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT v.violation, s.domain, s.command_id, format('%s %s: %s', s.kind, s.name, v.wrong)
    FROM commandbus.process_step s
    LEFT JOIN commandbus.process p ON p.domain = s.domain AND p.process_id = s.process_id
    LEFT JOIN commandbus._kept() c ON c.domain = s.command_domain AND c.command_id = s.command_id
    LEFT JOIN (
        SELECT r.domain, r.data ->> 'command_id' AS command_id, count(*) AS told,
               count(*) FILTER (WHERE r.status = 'COMPLETED' AND r.presented_token IS NOT NULL) AS handled
        FROM commandbus._kept() r WHERE r.command_type = 'Reply' GROUP BY 1, 2) r
      ON r.domain = s.domain AND r.command_id = s.command_id::text
    CROSS JOIN LATERAL (VALUES
        ('step_without_process', CASE WHEN p.process_id IS NULL THEN 'its process is not kept' END),
        ('step_without_command', CASE WHEN c.command_id IS NULL AND (s.status = 'OPEN' OR s.ended_at >=
                commandbus.clock() - (SELECT t.value::interval FROM commandbus.setting t WHERE t.name = 'retention'))
            THEN 'its command is not kept' END),
        ('step_status', CASE WHEN s.status <> 'OPEN' AND (c.finished_at IS NULL OR s.applied IS NOT NULL
                                                          AND s.status <> c.status) AND c.command_id IS NOT NULL
            THEN format('it is %s, its command is %s', s.status, c.status) END),
        ('reply_lost', CASE WHEN s.status = 'OPEN' AND s.kind IN ('step', 'undo') AND c.finished_at IS NOT NULL
                             AND (r.told IS NULL OR r.handled > 0)
            THEN format('its command is %s, and its reply %s', c.status,
                        CASE WHEN r.told IS NULL THEN 'was not sent' ELSE 'was not applied' END) END)
    ) AS v (violation, wrong)
    WHERE v.wrong IS NOT NULL;
END $$;
